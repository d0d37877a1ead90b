"""The head of the Ray cluster dies and comes back with its tables from a Redis: rollouts that run
do not notice, and engines can be replaced again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.test_node_loss import ANSWER_TIMEOUT_S, post, serving, settings
from tests.support.cluster_nodes import ClusterNodes
from tests.support.models import make_model, random_prompts
from tests.support.rollout_checks import check_books, greedy_body, tokens_of_whole
from tests.support.server_process import START_TIMEOUT_S, ServerProcess, wait_until

REDIS = shutil.which("redis-server")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(REDIS is None, reason="there is no redis-server"),
]

NUM_TOKENS = 300
NUM_REPEATS = 8
DOWN_S = 6.0
"""Longer than Ray's health checks of nodes take in these tests."""


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One for this test, which Ray is told of."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert REDIS is not None
    command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{port}")
    try:
        wait_until(lambda: _listens(port), 20, "redis to listen")
        yield
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def nodes(redis: None) -> Iterator[ClusterNodes]:
    """The head takes no engine; two workers have room for one, and one is spare."""
    nodes = ClusterNodes(1, 1, 1)
    try:
        yield nodes
    finally:
        nodes.shutdown()


def test_a_head_that_comes_back_costs_no_rollout_and_engines_are_replaced_again(
    nodes: ClusterNodes, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", seed=12)
    prompts = random_prompts(4, seed=5)
    server = ServerProcess(tmp_path, model, settings(nodes, model))
    try:
        wait_until(lambda: len(serving(server)) == 2, START_TIMEOUT_S, "two engines to serve")
        calm = post(server, greedy_body("calm", prompts, NUM_TOKENS))
        expected = tokens_of_whole(calm, len(prompts), NUM_TOKENS)
        before = {engine["pid"] for engine in serving(server).values()}

        body = greedy_body("headless", prompts * NUM_REPEATS, NUM_TOKENS)
        with ThreadPoolExecutor(1) as client:
            answer: Future[dict[str, Any]] = client.submit(post, server, body)
            wait_until(
                lambda: any(engine["num_running_reqs"] > 0 for engine in serving(server).values()),
                START_TIMEOUT_S,
                "work to begin",
            )
            nodes.kill_head()
            time.sleep(DOWN_S)
            nodes.restart_head()
            result = answer.result(ANSWER_TIMEOUT_S)
        tokens = tokens_of_whole(result, len(prompts) * NUM_REPEATS, NUM_TOKENS)
        assert tokens == expected * NUM_REPEATS
        assert {engine["pid"] for engine in serving(server).values()} == before, "none was lost"

        victim = min(before)
        family = [psutil.Process(victim), *psutil.Process(victim).children(recursive=True)]
        os.kill(victim, 9)
        psutil.wait_procs(family, timeout=30)
        wait_until(
            lambda: (
                len(serving(server)) == 2
                and victim not in {engine["pid"] for engine in serving(server).values()}
            ),
            START_TIMEOUT_S,
            "a replacement to serve",
        )
        again = post(server, greedy_body("after", prompts, NUM_TOKENS))
        assert tokens_of_whole(again, len(prompts), NUM_TOKENS) == expected
        check_books(server.client.get("/metrics").text, len(prompts) * (1 + NUM_REPEATS + 1))
        server.stop()
    finally:
        server.kill()
