"""An engine that freezes in the pause of a push, where it owes nobody a token or a status."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.engine_processes import core_of
from tests.support.architectures import QWEN2
from tests.support.server_process import START_TIMEOUT_S, ServerProcess, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONTEXT_LENGTH = 4096
NUM_TOKENS = 2000
"""Seconds of generation, which a push under ``wait`` waits for."""
FOUND_WITHIN_S = 40.0
"""Its calls have a limit of 120 s (``weights.pause_timeout_s`` + ``weights.commit_timeout_s``)."""


def only_engine(server: ServerProcess) -> dict[str, Any]:
    (engine,) = server.client.get("/v1/engines").json()["engines"]
    found: dict[str, Any] = engine
    return found


def test_it_is_given_up_and_what_it_had_is_finished_elsewhere(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": CONTEXT_LENGTH}
    model = QWEN2(tmp_path / "model", seed=8, **sizes)
    other_model = QWEN2(tmp_path / "other", seed=9, **sizes)
    server = ServerProcess(
        tmp_path,
        model,
        {
            "model": {
                "path": str(model),
                "dtype": "float32",
                "max_model_len": CONTEXT_LENGTH,
            },
            "engine": {
                "num_kv_blocks": 200,
                "block_size": 32,
                "max_num_seqs": 4,
                "status_timeout_s": 2,
                "max_status_timeouts": 2,
            },
            "drafter": {"enabled": False},
            "speculation": {"mode": "off"},
            "weights": {"pause_mode": "wait"},
        },
    )
    try:
        with ThreadPoolExecutor(2) as threads:
            sample = threads.submit(server.greedy, [[5, 6, 7]], NUM_TOKENS)
            wait_until(lambda: only_engine(server)["num_running_reqs"], 30, "the request to run")
            before = only_engine(server)
            push = threads.submit(server.publish, other_model, 1, 0)
            wait_until(lambda: only_engine(server)["state"] == "syncing", 30, "the push's pause")
            core_of(psutil.Process(before["pid"])).suspend()

            def pool() -> dict[str, Any]:
                (found,) = server.client.get("/v1/engines").json()["pools"]
                return dict(found)

            wait_until(lambda: pool()["num_losses"], FOUND_WITHIN_S, "the engine to be given up")
            assert "none of its processes did anything" in pool()["last_loss"]
            answer = push.result(timeout=FOUND_WITHIN_S)
            assert answer.status_code == 500, answer.text
            assert answer.json()["error"]["code"] == "weight_commit_failed"
            (finished,) = sample.result(timeout=START_TIMEOUT_S)
        assert len(finished["token_ids"]) == NUM_TOKENS
        assert {span["version"] for span in finished["weight_versions"]} == {0}
        assert only_engine(server)["engine_id"] != before["engine_id"]
        server.stop()
    finally:
        server.kill()
