"""The whole server as users start it: a process, real Ray, real engine, real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from safetensors.torch import load_file

from shared.weights import build_manifest, segment_name, write_safetensors
from tests.support.models import greedy_reference, make_model, random_prompts
from tests.support.server_process import (
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    engine_files,
    left_by_engines,
    push_to,
    wait_until,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Server:
    url: str
    pid: int
    model: Path
    client: httpx.Client
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    model = make_model(directory / "model", seed=11)
    config = directory / "config.yaml"
    settings = {
        "name": "served",
        "output_dir": str(directory),
        "model": {"path": str(model), "dtype": "float32", "max_model_len": 256},
        "engine": {"num_kv_blocks": 200, "block_size": 32, "max_num_seqs": 32},
        "speculation": {"mode": "always", "num_speculative_tokens": 3},
        "server": {"port": 0},
        "logging": {"format": "json"},
        "scoring": {"rewards": {"how_long": "tests.fakes.rewards:length"}},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    before = engine_files()
    log = (directory / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "rollout_server", "--config", str(config)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
    )
    ready = directory / "served" / "server.json"
    try:
        wait_until(
            lambda: ready.exists() or process.poll() is not None,
            START_TIMEOUT_S,
            "the server to start",
        )
        assert ready.exists(), (directory / "server.log").read_text()[-3000:]
        url = json.loads(ready.read_text())["url"]
        with httpx.Client(base_url=url, timeout=120) as client:
            yield Server(
                url=url, pid=process.pid, model=model, client=client, log=directory / "server.log"
            )
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0
        _, alive = psutil.wait_procs(family, timeout=15)
        assert alive == [], "processes left behind"
        assert left_by_engines(before) == set(), "shared memory left behind"
        assert not ready.exists()
    finally:
        if process.poll() is None:
            process.kill()
        log.close()


def greedy_body(prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    return {
        "prompts": [{"prompt_token_ids": prompt} for prompt in prompts],
        "sampling": {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True},
        **more,
    }


def publish(server: Server, source: Path, version: int, base: int) -> httpx.Response:
    return push_to(server.client, source, version, base)


def test_groups_come_back_scored_with_tokens_logprobs_and_versions(server: Server) -> None:
    body = {
        "prompts": [{"prompt": "1+2=", "answer": "3", "metadata": {"row": 7}}],
        "n": 3,
        "sampling": {"max_tokens": 12, "ignore_eos": True},
        "reward": {"name": "numeric_answer"},
    }
    answer = server.client.post("/v1/rollouts", json=body)
    assert answer.status_code == 200, answer.text
    (group,) = answer.json()["groups"]
    assert group["metadata"] == {"row": 7}
    assert [sample["sample_index"] for sample in group["samples"]] == [0, 1, 2]
    for sample in group["samples"]:
        assert len(sample["token_ids"]) == len(sample["logprobs"]) == 12
        assert sample["reward_status"] == "ok"
        assert sample["weight_versions"] == [{"version": 0, "start": 0, "end": 12}]
        assert sample["num_draft_tokens"] > 0


def test_streaming_gives_a_line_per_group_and_then_done(server: Server) -> None:
    body = greedy_body(random_prompts(5, seed=1), stream=True, reward={"name": "how_long"})
    with server.client.stream("POST", "/v1/rollouts", json=body) as stream:
        lines = [json.loads(line) for line in stream.iter_lines()]
    assert [line["type"] for line in lines] == ["group"] * 5 + ["done"]
    assert sorted(line["group"]["prompt_index"] for line in lines[:-1]) == list(range(5))
    for line in lines[:-1]:
        (sample,) = line["group"]["samples"]
        assert sample["reward"] == len(sample["text"])


def test_the_openai_client_works_unchanged(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    prompt = random_prompts(1, seed=2)[0]
    expected = greedy_reference(server.model, [prompt], 10)[0]
    completion = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=10,
        temperature=0,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert completion.choices[0].model_extra["token_ids"] == expected
    chunks = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=10,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == completion.choices[0].text


def test_bad_input_is_a_4xx_and_the_engine_lives(server: Server) -> None:
    bad = [
        ({"prompts": []}, "prompts"),
        ({"prompts": [{"prompt": ""}]}, "prompt"),
        ({"prompts": [{"prompt_token_ids": [32]}]}, "prompts.0.prompt_token_ids"),
        ({"prompts": [{"prompt": "1"}], "sampling": {"max_tokens": 256}}, "max_tokens"),
        ({"prompts": [{"prompt": "1"}], "sampling": {"temperature": -1}}, "temperature"),
        ({"prompts": [{"prompt": "1"}], "reward": {"name": "nonsense"}}, "reward"),
        ({"prompts": [{"prompt": "1"}], "typo": 1}, "typo"),
    ]
    for body, field in bad:
        answer = server.client.post("/v1/rollouts", json={"sampling": {"max_tokens": 8}, **body})
        assert 400 <= answer.status_code < 500, (body, answer.text)
        assert field in answer.json()["error"]["message"] + str(answer.json()["error"]["param"])
    (engine,) = server.client.get("/v1/engines").json()["engines"]
    assert engine["state"] == "serving"


def test_a_push_changes_the_policy_and_a_joining_engine_starts_on_it(
    server: Server, tmp_path: Path
) -> None:
    prompts = random_prompts(6, seed=4)
    new_model = make_model(tmp_path / "new", seed=99)
    pushed = publish(server, new_model, version=1, base=0)
    assert pushed.status_code == 200, pushed.text
    assert [timing["engine_id"] for timing in pushed.json()["engines"]] == ["engine-0"]

    expected = greedy_reference(new_model, prompts, 20)
    answer = server.client.post("/v1/rollouts", json=greedy_body(prompts)).json()
    assert [g["samples"][0]["token_ids"] for g in answer["groups"]] == expected

    assert publish(server, new_model, version=3, base=0).status_code == 409
    broken = make_model(tmp_path / "broken", seed=5)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    path = Path("/dev/shm") / segment_name(os.getpid(), 2)
    write_safetensors(path, [(n, "F32", list(t.shape), t.numpy()) for n, t in tensors.items()])
    manifest = build_manifest(path).model_dump()
    refused = server.client.post(
        "/v1/weights", json={"version": 2, "base_version": 1, "manifest": manifest}
    )
    path.unlink()
    assert refused.status_code == 422
    assert "model.norm.weight" in refused.json()["error"]["message"]

    assert server.client.put("/v1/engines", json={"count": 2}).status_code == 200
    wait_until(
        lambda: engine_states(server) == ["serving", "serving"], START_TIMEOUT_S, "the engines"
    )
    weights = server.client.get("/v1/weights").json()
    assert weights["committed_version"] == 1
    assert {(e["target_version"], e["drafter_version"]) for e in weights["engines"]} == {(1, 1)}
    answer = server.client.post("/v1/rollouts", json=greedy_body(prompts * 4)).json()
    samples = [group["samples"][0] for group in answer["groups"]]
    assert [sample["token_ids"] for sample in samples] == expected * 4
    assert {sample["engine_id"] for sample in samples} == {"engine-0", "engine-1"}

    assert server.client.put("/v1/engines", json={"count": 1}).status_code == 200
    wait_until(lambda: engine_states(server) == ["serving"], STOP_TIMEOUT_S, "the engines")


def engine_states(server: Server) -> list[str]:
    return [engine["state"] for engine in server.client.get("/v1/engines").json()["engines"]]


def test_speculation_changes_live(server: Server) -> None:
    changed = server.client.patch(
        "/v1/speculation",
        json={"mode": "kv_gate", "kv_cache_threshold": 0.0, "kv_cache_hysteresis": 0},
    )
    assert changed.status_code == 200, changed.text
    answer = server.client.post("/v1/rollouts", json=greedy_body(random_prompts(2, seed=8))).json()
    assert answer["usage"]["num_draft_tokens"] == 0
    (engine,) = server.client.get("/v1/speculation").json()["engines"]
    assert engine["reason"] == "above_threshold"
    too_long = server.client.patch("/v1/speculation", json={"num_speculative_tokens": 4})
    assert too_long.status_code == 400
    assert "limit of 3" in too_long.json()["error"]["message"]


def test_a_killed_engine_is_replaced_and_serves_the_committed_weights(server: Server) -> None:
    (before,) = server.client.get("/v1/engines").json()["engines"]
    os.kill(before["pid"], signal.SIGKILL)

    def replaced() -> bool:
        engines = server.client.get("/v1/engines").json()["engines"]
        return [e["state"] for e in engines] == ["serving"] and (
            engines[0]["engine_id"] != before["engine_id"]
        )

    wait_until(replaced, START_TIMEOUT_S, "a replacement")
    committed = server.client.get("/v1/weights").json()["committed_version"]
    (engine,) = server.client.get("/v1/engines").json()["engines"]
    assert engine["target_version"] == engine["drafter_version"] == committed


def test_metrics_of_vllm_and_log_lines_of_the_server_carry_their_ids(server: Server) -> None:
    body = {"request_id": "watched", "prompts": [{"prompt_token_ids": [1, 2, 3]}]}
    body |= {"sampling": {"max_tokens": 4, "ignore_eos": True}}
    server.client.post("/v1/rollouts", json=body).raise_for_status()
    text = server.client.get("/metrics").text
    engine_id = server.client.get("/v1/engines").json()["engines"][0]["engine_id"]
    assert f'vllm:generation_tokens_total{{engine="{engine_id}",engine_index="0"' in text
    assert f'slipstream_engine_metrics_age_seconds{{engine="{engine_id}"}}' in text
    entries = [
        json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")
    ]
    assert {entry["process"] for entry in entries} == {"server"}
    (finished,) = (entry for entry in entries if entry.get("request_id") == "watched")
    assert finished["message"].startswith("rollout watched finished: 1 of 1 groups")
