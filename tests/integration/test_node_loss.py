"""A node of the Ray cluster dies in the middle of generation: its engine is replaced on another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.cluster_nodes import ClusterNodes
from tests.support.models import make_model, random_prompts
from tests.support.rollout_checks import (
    check_books,
    engines_of,
    greedy_body,
    metrics_of,
    tokens_of_whole,
)
from tests.support.server_process import (
    START_TIMEOUT_S,
    ServerProcess,
    engine_files,
    left_by_engines,
    wait_until,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_TOKENS = 300
NUM_REPEATS = 8
ANSWER_TIMEOUT_S = 120.0


@pytest.fixture
def nodes() -> Iterator[ClusterNodes]:
    """The server's node takes no engine; two others have room, one of them for two."""
    nodes = ClusterNodes(1, 2)
    try:
        yield nodes
    finally:
        nodes.shutdown()


def settings(nodes: ClusterNodes, model: Path) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    placed = nodes.settings()
    return {
        **placed,
        "model": {"path": str(model), "dtype": "float32", "max_model_len": 512},
        "engine": {
            **placed["engine"],
            "count": 2,
            "cpu_cores": [str(cores[0]), str(cores[-1])],
            "num_kv_blocks": 200,
            "block_size": 32,
            "max_num_seqs": 4,
        },
        "server": {"port": 0, "progress_interval_s": 0.2},
    }


def serving(server: ServerProcess) -> dict[str, dict[str, Any]]:
    """Engines that serve and whose status has been heard, by id."""
    engines = server.client.get("/v1/engines").json()["engines"]
    return {
        engine["engine_id"]: engine
        for engine in engines
        if engine["state"] == "serving" and engine["pid"] is not None
    }


def post(server: ServerProcess, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(
        f"{server.client.base_url}/v1/rollouts", json=body, timeout=ANSWER_TIMEOUT_S
    )
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_a_killed_raylet_costs_no_rollout_and_its_engine_comes_back_on_another_node(
    nodes: ClusterNodes, tmp_path: Path
) -> None:
    before = engine_files()
    model = make_model(tmp_path / "model", seed=11)
    prompts = random_prompts(4, seed=4)
    server = ServerProcess(tmp_path, model, settings(nodes, model))
    try:
        wait_until(lambda: len(serving(server)) == 2, START_TIMEOUT_S, "two engines to serve")
        small, large = sorted(nodes.room, key=nodes.room.__getitem__)
        by_node = {engine["node_id"]: engine for engine in serving(server).values()}
        assert by_node.keys() == {small, large}
        expected = tokens_of_whole(
            post(server, greedy_body("calm", prompts, NUM_TOKENS)), len(prompts), NUM_TOKENS
        )

        lost = by_node[small]
        actor = psutil.Process(lost["pid"])
        family = [actor, *actor.children(recursive=True)]
        body = greedy_body("killed", prompts * NUM_REPEATS, NUM_TOKENS)
        with ThreadPoolExecutor(1) as client:
            answer: Future[dict[str, Any]] = client.submit(post, server, body)
            wait_until(
                lambda: serving(server)[lost["engine_id"]]["num_running_reqs"] > 0,
                START_TIMEOUT_S,
                "the node's engine to have work",
            )
            nodes.kill_raylet(small)
            result = answer.result(ANSWER_TIMEOUT_S)
        tokens = tokens_of_whole(result, len(prompts) * NUM_REPEATS, NUM_TOKENS)
        assert tokens == expected * NUM_REPEATS
        figures = metrics_of(server.client.get("/metrics").text)
        assert figures["generate_retries_total"] > 0, "the node held no work"

        wait_until(lambda: len(serving(server)) == 2, START_TIMEOUT_S, "a replacement to serve")
        engines = serving(server)
        assert lost["engine_id"] not in engines
        assert {engine["node_id"] for engine in engines.values()} == {large}
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == [], "processes of the lost engine"
        again = post(server, greedy_body("after", prompts * 4, NUM_TOKENS))
        assert tokens_of_whole(again, len(prompts) * 4, NUM_TOKENS) == expected * 4
        assert engines_of(again) == engines.keys()
        check_books(server.client.get("/metrics").text, len(prompts) * (1 + NUM_REPEATS + 4))
        server.stop()
        assert left_by_engines(before) == set(), "shared memory left behind"
    finally:
        server.kill()
