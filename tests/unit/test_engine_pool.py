"""The pool over engines in memory: starts, replaces, backs off, gives up, drains."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.pool import RayEnginePool
from rollout_server.engine.protocol import EngineHandle, ModelInfo
from rollout_server.speculation.calibration import SelfCalibration
from rollout_server.speculation.cost_model import conservative_model
from shared.config.loading import validate_run_config
from shared.errors import EngineError, InvalidRequestError
from shared.pool_types import RestartState
from shared.schemas.engines import EnginePoolStatus
from shared.types import EngineState
from tests.fakes.pooled import FakeEngines, FakePooledEngine
from tests.fakes.service import until
from tests.unit.test_calibration_files import key

MODEL = ModelInfo(model_id="m", vocab_size=8, max_model_len=64)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A pool, the engines it made, and its clock."""

    def __init__(self, directory: Path, **engine: Any) -> None:
        config = validate_run_config(
            {"model": {"path": "m"}, "output_dir": str(directory), "engine": engine}
        )
        self.clock = Clock()
        self.engines = FakeEngines()
        self.pool = RayEnginePool(config, MODEL, "cpu", self.engines, self.clock)

    def serving(self) -> list[str]:
        return [e.engine_id for e in self.pool.engines() if e.state is EngineState.SERVING]

    def status(self, name: str = "default") -> EnginePoolStatus:
        return next(pool for pool in self.pool.pools() if pool.name == name)

    async def settle(self) -> None:
        """Let the pool look at things, and end what it began."""
        self.pool._wake.set()
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.pool.RECONCILE_INTERVAL_S", 0.005)
    monkeypatch.setattr("rollout_server.engine.pool.DRAIN_POLL_S", 0.005)


@asynccontextmanager
async def started(directory: Path, **engine: Any) -> AsyncIterator[World]:
    world = World(directory, **engine)
    try:
        await world.pool.start()
        yield world
    finally:
        await world.pool.close()


def cores(engines: Sequence[FakePooledEngine]) -> list[str | None]:
    return [engine.spec.cpu_cores for engine in engines]


async def test_one_pool_without_a_name_serves_as_before(tmp_path: Path) -> None:
    async with started(tmp_path, count=2, max_count=3, cpu_cores=["0", "1"]) as world:
        assert world.serving() == ["engine-0", "engine-1"]
        assert cores(world.engines.made) == ["0", "1"]
        assert world.pool.target_count == 2
        status = world.status()
        assert (status.num_engines, status.num_serving, status.max_count) == (2, 2, 3)
        with pytest.raises(InvalidRequestError, match=r"count 4 is above engine\.max_count 3"):
            await world.pool.scale(4)


async def test_each_pool_has_its_own_settings_and_count(tmp_path: Path) -> None:
    pools = [{"name": "small", "count": 2}, {"name": "large", "tensor_parallel_size": 4}]
    async with started(tmp_path, pools=pools, max_num_seqs=16) as world:
        sizes = {
            engine.engine_id: (engine.spec.pool, engine.spec.engine.tensor_parallel_size)
            for engine in world.engines.made
        }
        assert sizes == {
            "engine-0": ("small", 1),
            "engine-1": ("small", 1),
            "engine-2": ("large", 4),
        }
        assert {engine.spec.engine.max_num_seqs for engine in world.engines.made} == {16}
        await world.pool.scale(0, "small")
        await until(lambda: world.serving() == ["engine-2"], "the small pool to drain")
        assert world.pool.target_count == 1


@pytest.mark.parametrize("name", [None, "tiny"])
async def test_with_several_pools_one_must_be_named(tmp_path: Path, name: str | None) -> None:
    async with started(tmp_path, pools=[{"name": "a"}, {"name": "b"}]) as world:
        with pytest.raises(InvalidRequestError, match="a, b") as caught:
            await world.pool.scale(2, name)
        assert caught.value.param == "pool"
        assert world.pool.target_count == 2


async def test_a_server_whose_engine_does_not_start_says_why_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, pools=[{"name": "a"}, {"name": "b"}])
    world.engines.start_errors["b"] = EngineError("no such model")
    world.engines.stop_s = 0.1  # the failure ends the start while the engine is being stopped
    with pytest.raises(EngineError, match=r"no engine could start: .*no such model"):
        await world.pool.start()
    assert [engine.state for engine in world.engines.made] == [EngineState.DEAD] * 2
    assert all(engine.stopped for engine in world.engines.made)


async def test_an_engine_that_dies_is_replaced_after_the_backoff_on_its_cores(
    tmp_path: Path,
) -> None:
    async with started(tmp_path, count=2, cpu_cores=["0", "1"]) as world:
        world.engines.made[0].die("its process ended")
        await world.settle()
        assert world.serving() == ["engine-1"]
        assert world.status().restart_state is RestartState.BACKING_OFF
        assert world.status().restart_in_s == 1.0
        world.clock.now_s = 1.0
        await until(lambda: world.serving() == ["engine-1", "engine-2"], "a replacement")
        assert cores(world.engines.made) == ["0", "1", "0"]
        assert world.engines.made[0].stopped == ["its process ended"]
        assert world.status().num_losses == 1
        assert world.status().last_loss == "its process ended"


async def test_each_failed_start_doubles_the_wait_and_a_quarantine_ends_the_attempts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tmp_path, restart_budget=3) as world:
        world.engines.start_errors["default"] = EngineError("out of memory")
        world.engines.made[0].die()
        waits = []
        for _ in range(3):
            state = RestartState.BACKING_OFF
            await until(lambda s=state: world.status().restart_state is s, "a backoff")
            waits.append(world.status().restart_in_s)
            world.clock.now_s += waits[-1]
            num_made = len(world.engines.made)
            await until(lambda n=num_made: len(world.engines.made) > n, "an attempt")
        await until(
            lambda: world.status().restart_state is RestartState.QUARANTINED, "the quarantine"
        )
        world.clock.now_s += 10_000
        await world.settle()
        assert waits == [1.0, 2.0, 4.0]
        assert len(world.engines.made) == 4, "the first and three attempts"
        assert "engine.restart_budget" in caplog.text
        assert "out of memory" in (world.status().last_loss or "")
        world.pool.adjust(2, "default")
        await world.settle()
        assert len(world.engines.made) == 4, "the policy does not end a quarantine"
        world.engines.start_errors.clear()
        await world.pool.scale(1)
        await until(lambda: world.serving() == ["engine-4"], "an operator to end it")
        assert world.status().num_losses_in_window == 0
        assert world.status().num_losses == 4


async def test_the_quarantine_of_one_pool_leaves_the_others_alone(tmp_path: Path) -> None:
    pools = [{"name": "a"}, {"name": "b"}]
    async with started(tmp_path, pools=pools, restart_budget=0) as world:
        for engine in world.engines.of("a"):
            engine.die()
        await until(
            lambda: world.status("a").restart_state is RestartState.QUARANTINED, "a quarantine"
        )
        await world.pool.scale(2, "b")
        await until(lambda: world.serving() == ["engine-1", "engine-2"], "b to grow")
        assert world.status("b").restart_state is RestartState.READY
        assert world.status("a").num_engines == 0


async def test_an_unexpected_error_at_a_start_is_a_loss_like_any_other(tmp_path: Path) -> None:
    async with started(tmp_path) as world:
        world.engines.start_errors["default"] = ZeroDivisionError()  # type: ignore[assignment]
        await world.pool.scale(2)
        await until(lambda: world.status().num_losses == 1, "the loss")
        assert "ZeroDivisionError" in (world.status().last_loss or "")
        assert world.engines.made[1].state is EngineState.DEAD


async def test_an_engine_condemned_while_it_prepares_never_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def condemn(handle: EngineHandle) -> None:
        handle.condemn("its weights could not be loaded")

    world = World(tmp_path)
    world.pool.before_serving(condemn)
    with pytest.raises(EngineError, match="its weights could not be loaded"):
        await world.pool.start()
    assert "engine engine-0 failed to start: its weights could not be loaded" in caplog.text


async def test_surplus_engines_finish_their_work_and_are_not_replaced(tmp_path: Path) -> None:
    async with started(tmp_path, count=3) as world:
        newest = world.engines.made[2]
        newest.num_running = 1
        await world.pool.scale(2)
        await until(lambda: newest.state is EngineState.DRAINING, "a drain to begin")
        await world.settle()
        assert not newest.stopped
        newest.num_running = 0
        await until(lambda: newest.stopped == ["drained"], "the drain to end")
        assert len(world.engines.made) == 3
        assert world.status().num_losses == 0


async def test_an_engine_that_dies_while_it_drains_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(tmp_path, count=2) as world:
        monkeypatch.setattr("rollout_server.engine.pool.DRAIN_POLL_S", 0.2)
        newest = world.engines.made[1]
        newest.num_running = 1
        await world.pool.scale(1)
        await until(lambda: newest.state is EngineState.DRAINING, "a drain to begin")
        newest.die("killed")
        await world.settle()
        assert newest.stopped == [], "the drain looks again later"
        await until(lambda: newest.stopped == ["drained"], "it to be stopped")
        await world.settle()
        assert world.status().num_losses == 0
        assert len(world.engines.made) == 2


async def test_no_id_is_ever_used_twice(tmp_path: Path) -> None:
    async with started(tmp_path, count=2, restart_budget=100) as world:
        for number in range(5):
            world.engines.made[-1].die()
            await world.settle()
            world.clock.now_s += 100.0
            await until(lambda n=number: len(world.engines.made) == 3 + n, "a replacement")
            await until(lambda: len(world.serving()) == 2, "it to serve")
        ids = [engine.engine_id for engine in world.engines.made]
        assert ids == [f"engine-{number}" for number in range(7)]


async def test_what_an_engine_measured_of_itself_is_given_to_those_of_its_pool_that_follow(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, pools=[{"name": "a", "max_count": 2}, {"name": "b", "max_count": 2}])
    measured = SelfCalibration(key=key(), cost_model=conservative_model())
    world.engines.measured["a"] = measured
    try:
        await world.pool.start()
        await world.pool.scale(2, "a")
        await world.pool.scale(2, "b")
        await until(lambda: len(world.serving()) == 4, "two engines more")
        given = {pool: [e.spec.calibrations for e in world.engines.of(pool)] for pool in "ab"}
        assert given == {"a": [(), (measured,)], "b": [(), ()]}
    finally:
        await world.pool.close()


@pytest.mark.parametrize("turns", range(5))
async def test_a_pool_that_is_woken_up_as_it_closes_still_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr("rollout_server.engine.pool.RECONCILE_INTERVAL_S", 60.0)
    async with started(tmp_path) as world:
        await world.settle()  # nothing is left to do but to wait
        world.pool._wake.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await world.pool.close()


async def test_a_change_of_the_count_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tmp_path) as world:
        with caplog.at_level(logging.INFO):
            await world.pool.scale(2)
        assert "pool default: from 1 to 2 engines" in caplog.text
