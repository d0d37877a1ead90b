"""Engines that are drained and removed by request, over engines in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConflictError, EngineError, UnknownResourceError
from shared.types import EngineState
from tests.fakes.service import until
from tests.unit.test_engine_pool import started


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.pool.RECONCILE_INTERVAL_S", 0.005)
    monkeypatch.setattr("rollout_server.engine.pool.DRAIN_POLL_S", 0.005)


async def test_a_drained_engine_is_replaced_at_once_and_stops_when_it_is_empty(
    tmp_path: Path,
) -> None:
    async with started(tmp_path, count=2) as world:
        leaving = world.engines.made[0]
        leaving.num_running = 1
        world.pool.drain("engine-0", replace=True)
        world.pool.drain("engine-0", replace=True)  # repeating it is no error
        await until(lambda: world.serving() == ["engine-1", "engine-2"], "the replacement")
        assert leaving.state is EngineState.DRAINING
        assert leaving.stopped == []
        leaving.num_running = 0
        await until(lambda: leaving.stopped == ["drained"], "it to stop")
        assert world.status().num_losses == 0


async def test_without_a_replacement_the_target_goes_down(tmp_path: Path) -> None:
    async with started(tmp_path, count=3) as world:
        world.pool.drain("engine-0", replace=False)
        world.pool.remove("engine-1", replace=False)
        assert world.pool.target_count == 1
        await until(lambda: world.engines.made[0].stopped == ["drained"], "it to stop")
        await world.settle()
        assert world.serving() == ["engine-2"]
        assert len(world.engines.made) == 3


async def test_a_removed_engine_stops_whatever_it_does_and_is_no_loss(tmp_path: Path) -> None:
    async with started(tmp_path, count=1) as world:
        busy = world.engines.made[0]
        busy.num_running = 4
        world.pool.remove("engine-0", replace=True)
        assert busy.state is EngineState.DEAD
        await until(lambda: world.serving() == ["engine-1"], "the replacement")
        assert busy.stopped == ["removed by request"]
        assert world.status().num_losses == 0


async def test_an_engine_that_starts_cannot_be_drained_but_removed(tmp_path: Path) -> None:
    async with started(tmp_path, count=1) as world:
        world.engines.held_pools.add("default")
        await world.pool.scale(2)
        await until(lambda: len(world.engines.made) == 2, "the second one to start")
        with pytest.raises(ConflictError, match="engine-1 is starting"):
            world.pool.drain("engine-1", replace=True)
        world.pool.remove("engine-1", replace=False)
        world.engines.made[1].may_start.set()
        await world.settle()
        assert world.serving() == ["engine-0"]
        assert world.pool.target_count == 1
        assert world.status().num_losses == 0


async def test_an_engine_that_is_drained_can_be_removed_without_counting_twice(
    tmp_path: Path,
) -> None:
    async with started(tmp_path, count=2) as world:
        leaving = world.engines.made[0]
        leaving.num_running = 1
        world.pool.drain("engine-0", replace=False)
        await until(lambda: leaving.state is EngineState.DRAINING, "it to drain")
        await world.settle()
        world.pool.remove("engine-0", replace=False)
        await until(lambda: bool(leaving.stopped), "it to stop")
        assert world.pool.target_count == 1
        assert world.serving() == ["engine-1"]


async def test_an_unknown_engine_is_named_with_those_there_are(tmp_path: Path) -> None:
    async with started(tmp_path, count=2) as world:
        for leave in (world.pool.drain, world.pool.remove):
            with pytest.raises(UnknownResourceError, match="engine-0, engine-1"):
                leave("engine-9", replace=True)


async def test_an_engine_that_was_removed_while_it_was_made_is_stopped_again(
    tmp_path: Path,
) -> None:
    async with started(tmp_path, count=1) as world:
        world.engines.held_pools.add("default")
        await world.pool.scale(2)
        await until(lambda: len(world.engines.made) == 2, "the second one to start")
        joiner = world.engines.made[1]
        world.pool.remove("engine-1", replace=False)
        await until(lambda: joiner.stopped == ["removed by request"], "it to stop")
        joiner.may_start.set()  # Ray has made the actor and its placement only now
        await until(lambda: joiner.stopped[1:] == ["removed while it started"], "it to go")


async def test_one_status_that_fails_does_not_end_a_drain(tmp_path: Path) -> None:
    async with started(tmp_path, count=2) as world:
        leaving = world.engines.made[0]
        leaving.num_running, leaving.fail_with = 1, EngineError("a long step")
        world.pool.drain("engine-0", replace=False)
        await world.settle()
        assert leaving.stopped == []
        leaving.fail_with = None
        await world.settle()
        assert leaving.stopped == [], "it still has a request"
        leaving.num_running = 0
        await until(lambda: leaving.stopped == ["drained"], "it to stop")


async def test_the_target_never_goes_below_nothing(tmp_path: Path) -> None:
    async with started(tmp_path, count=1) as world:
        await world.pool.scale(0)
        world.pool.remove("engine-0", replace=False)
        assert world.pool.target_count == 0
