"""A real server is killed and started again: it goes on with the weights it had committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.server_process import ServerProcess, engine_files, left_by_engines

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

PHASES = {"verifying", "staging", "loading", "recording", "resume"}


def test_a_killed_server_comes_back_with_what_it_had_committed(tmp_path: Path) -> None:
    before = engine_files()
    model = make_model(tmp_path / "model", seed=11)
    new_model = make_model(tmp_path / "new", seed=99)
    prompts = random_prompts(4, seed=4)
    expected = greedy_reference(new_model, prompts, 20)
    settings = {"weights": {"audit_every": 1}}

    server = ServerProcess(tmp_path, model, settings)
    pushed = server.publish(new_model, version=7, base_version=0)
    assert pushed.status_code == 200, pushed.text
    assert set(pushed.json()["phases_s"]) == PHASES
    server.kill()

    server = ServerProcess(tmp_path, model, settings)
    try:
        weights = server.client.get("/v1/weights").json()
        assert weights["committed_version"] == 7
        assert [(e["target_version"], e["drafter_version"]) for e in weights["engines"]] == [(7, 7)]
        samples = server.greedy(prompts, 20)
        assert [sample["token_ids"] for sample in samples] == expected
        assert samples[0]["weight_versions"] == [{"version": 7, "start": 0, "end": 20}]
        audit = server.client.post("/v1/weights/audit").json()
        assert (audit["version"], audit["is_intact"]) == (7, True)
        assert audit["engines"][0]["num_skipped"] == 0
        again = server.publish(new_model, version=7, base_version=0)
        assert (again.status_code, again.json()["engines"]) == (200, [])
        assert server.publish(model, version=7, base_version=0).status_code == 409
        assert server.publish(new_model, version=8, base_version=0).status_code == 409
    finally:
        server.stop()
    assert left_by_engines(before) == set(), "shared memory left behind"
    kept = list((tmp_path / "served" / "weights").glob("*.safetensors"))
    assert [path.name for path in kept] == ["slipstream-kept-v7.safetensors"]
