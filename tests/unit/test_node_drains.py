"""Engines of nodes that are about to go, over engines in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.node_drains import STOP_MARGIN_S, NodeWatch, drain_time_s
from rollout_server.engine.pool import RayEnginePool
from shared.config.loading import validate_run_config
from shared.errors import UnavailableError
from shared.types import EngineState
from tests.fakes.pooled import FakeEngines, FakePooledEngine
from tests.fakes.service import until
from tests.unit.test_engine_pool import MODEL

NODES = ("left", "right")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.pool.RECONCILE_INTERVAL_S", 0.005)
    monkeypatch.setattr("rollout_server.engine.pool.DRAIN_POLL_S", 0.005)


@pytest.mark.parametrize(
    ("goes_in_s", "has_s"),
    [(None, 120), (300, 120), (30, 30 - STOP_MARGIN_S), (STOP_MARGIN_S, 0), (-10, 0)],
)
def test_an_engine_has_its_drain_time_or_what_is_left_of_its_node(
    goes_in_s: float | None, has_s: float
) -> None:
    goes_at_s = None if goes_in_s is None else 1000.0 + goes_in_s
    assert drain_time_s(120.0, goes_at_s, 1000.0) == has_s


class Cluster:
    """What Ray says of its nodes."""

    def __init__(self) -> None:
        self.draining: dict[str, float | None] = {}
        self.num_asked = 0
        self.is_away = False

    def ask(self) -> Mapping[str, float | None]:
        self.num_asked += 1
        if self.is_away:
            raise UnavailableError("the head does not answer")
        return dict(self.draining)


class World:
    """A pool of engines that go to the nodes that are left, in turn."""

    def __init__(self, directory: Path, **engine: Any) -> None:
        self.cluster = Cluster()
        self.engines = FakeEngines()
        settings = {"node_poll_s": 0.005, **engine}
        config = validate_run_config(
            {"model": {"path": "m"}, "output_dir": str(directory), "engine": settings}
        )
        ask = self.cluster.ask
        self.pool = RayEnginePool(config, MODEL, "cpu", self._create, draining_nodes=ask)

    def _create(self, spec: Any) -> FakePooledEngine:
        engine = self.engines(spec)
        allowed = [name for name in NODES if name not in self.cluster.draining]
        engine.node_id = allowed[len(self.engines.made) % len(allowed)]
        return engine

    def serving(self) -> list[str]:
        return [e.node_id for e in self.engines.made if e.state is EngineState.SERVING]

    def on(self, node_id: str) -> list[FakePooledEngine]:
        return [engine for engine in self.engines.made if engine.node_id == node_id]

    async def asked_again(self) -> None:
        seen = self.cluster.num_asked
        await until(lambda: self.cluster.num_asked > seen + 3, "further questions")


@asynccontextmanager
async def started(directory: Path, **engine: Any) -> AsyncIterator[World]:
    world = World(directory, **engine)
    try:
        await world.pool.start()
        yield world
    finally:
        await world.pool.close()


async def test_engines_of_a_node_that_is_about_to_go_are_drained_and_replaced_elsewhere(
    tmp_path: Path,
) -> None:
    async with started(tmp_path, count=4) as world:
        (leaving, also_leaving) = world.on("left")
        leaving.num_running = 2
        world.cluster.draining["left"] = None
        await until(lambda: world.serving() == ["right"] * 4, "others in their place")
        assert leaving.state is EngineState.DRAINING, "it still works on what it holds"
        await until(lambda: also_leaving.stopped == ["drained"], "the idle one to stop")
        assert leaving.stopped == []
        leaving.num_running = 0
        await until(lambda: leaving.stopped == ["drained"], "the busy one to stop")
        (status,) = world.pool.pools()
        assert (status.target_count, status.num_losses) == (4, 0)
        await world.asked_again()
        assert len(world.engines.made) == 6


async def test_engines_stop_before_their_node_goes_whatever_they_hold(tmp_path: Path) -> None:
    async with started(tmp_path, count=2) as world:
        (leaving,) = world.on("left")
        leaving.num_running = 2
        world.cluster.draining["left"] = time.time() + STOP_MARGIN_S + 0.05
        await until(lambda: leaving.stopped == ["drained"], "it to stop")
        assert leaving.num_running == 2
        assert world.pool.pools()[0].num_losses == 0


async def test_an_engine_inside_a_commit_is_drained_after_it(tmp_path: Path) -> None:
    async with started(tmp_path, count=2) as world:
        (leaving,) = world.on("left")
        leaving.state = EngineState.SYNCING
        world.cluster.draining["left"] = None
        await world.asked_again()
        assert leaving.state is EngineState.SYNCING
        leaving.state = EngineState.SERVING
        await until(lambda: leaving.stopped == ["drained"], "it to stop")


async def test_nodes_that_stay_keep_their_engines(tmp_path: Path) -> None:
    async with started(tmp_path, count=2) as world:
        world.cluster.draining["somebody else's"] = None
        await world.asked_again()
        assert world.serving() == ["right", "left"]
        assert len(world.engines.made) == 2


async def test_a_cluster_that_does_not_answer_for_a_while_is_asked_again(tmp_path: Path) -> None:
    async with started(tmp_path, count=2) as world:
        world.cluster.is_away = True
        await world.asked_again()
        world.cluster.is_away = False
        world.cluster.draining["left"] = None
        await until(lambda: world.serving() == ["right", "right"], "the replacement")


async def test_a_question_that_hangs_is_not_asked_twice() -> None:
    answer, num_asked = threading.Event(), 0

    def ask() -> dict[str, float | None]:
        nonlocal num_asked
        num_asked += 1
        answer.wait(10)
        return {"left": 1.0}

    told: list[Mapping[str, float | None]] = []
    watch = asyncio.create_task(NodeWatch(ask, 0.001, told.append).run())
    await until(lambda: num_asked == 1, "the question")
    await asyncio.sleep(0.05)
    assert (num_asked, told) == (1, [])
    answer.set()
    await until(lambda: bool(told), "the answer")
    watch.cancel()
    assert told[0] == {"left": 1.0}
