"""Weight pushes that meet: with each other, with engines that come and go, with a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.errors import (
    ConflictError,
    SlipstreamError,
    UnavailableError,
    WeightCommitError,
    WeightVerificationError,
)
from shared.types import EngineState
from tests.fakes.weight_push import FakeEngine, StartWorld, worlds


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


async def test_an_engine_that_began_to_drain_is_not_committed_on(start: StartWorld) -> None:
    it = start()
    it.second.stage_gate.clear()
    push = asyncio.create_task(it.push(1, 0))
    await it.second.staging.wait()
    it.first.state = EngineState.DRAINING
    it.second.stage_gate.set()
    response = await push
    assert [timings.engine_id for timings in response.engines] == ["e1"]
    assert response.engines_removed == []
    assert not it.first.committing.is_set()


async def test_concurrent_pushes_run_one_after_the_other(start: StartWorld) -> None:
    it = start()
    it.first.commit_gate.clear()
    first = asyncio.create_task(it.push(1, 0))
    await it.first.committing.wait()
    it.second.staging.clear()
    rival = asyncio.create_task(it.push(2, 0))
    follower = asyncio.create_task(it.push(3, 1))
    await asyncio.sleep(0)
    assert not it.second.staging.is_set()
    it.first.commit_gate.set()
    assert (await first).version == 1
    with pytest.raises(ConflictError, match="base_version 0"):
        await rival
    assert (await follower).version == 3
    assert it.files() == it.server_files(3, spare=1)


async def test_a_push_does_not_wait_for_ever_for_another(start: StartWorld) -> None:
    it = start(lock_timeout_s=0.05)
    it.first.stage_gate.clear()
    first = asyncio.create_task(it.push(1, 0))
    await it.first.staging.wait()
    with pytest.raises(UnavailableError, match=r"0\.05 s .*weights\.lock_timeout_s"):
        await it.push(2, 0)
    it.first.stage_gate.set()
    assert (await first).version == 1


async def test_where_a_second_push_is_refused_at_once_an_engine_still_waits_to_join(
    start: StartWorld,
) -> None:
    it = start(lock_timeout_s=0)
    it.first.stage_gate.clear()
    first = asyncio.create_task(it.push(1, 0, (3.0, 4.0)))
    await it.first.staging.wait()
    with pytest.raises(UnavailableError, match="0 s"):
        await it.push(2, 0)
    newcomer = FakeEngine("e2", EngineState.STARTING)
    join = asyncio.create_task(it.join(newcomer))
    await asyncio.sleep(0.02)
    assert not join.done()
    it.first.stage_gate.set()
    await first
    await join
    assert newcomer.loaded == [3.0, 4.0]


async def test_a_refused_push_changes_nothing_in_the_answer_to_the_committed_one(
    start: StartWorld,
) -> None:
    it = start()
    request = it.request(1, 0)
    answer = await it.coordinator.publish(request)
    it.first.stage_error = WeightVerificationError("does not fit")
    with pytest.raises(WeightVerificationError):
        await it.push(2, 1)
    assert await it.coordinator.publish(request) == answer


async def test_a_caller_that_hangs_up_does_not_stop_the_push(start: StartWorld) -> None:
    it = start()
    it.first.commit_gate.clear()
    request = it.request(1, 0)
    caller = asyncio.create_task(it.coordinator.publish(request))
    await it.first.committing.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    again = asyncio.create_task(it.coordinator.publish(request))
    it.first.commit_gate.set()
    assert (await again).version == 1
    assert it.versions() == [1, 1]
    assert [entry.version for entry in it.coordinator.status().history] == [1]


async def test_closing_in_the_middle_of_a_push_leaves_nothing_behind(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0)
    it.first.stage_gate.clear()
    it.first.staging.clear()
    push = asyncio.create_task(it.push(2, 1))
    await it.first.staging.wait()
    await it.coordinator.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        await push
    assert it.versions() == [1, 1]
    assert it.second.staged is None
    assert it.files() == []
    with pytest.raises(UnavailableError, match="shutting down"):
        await it.push(2, 1)
    with pytest.raises(UnavailableError, match="shutting down"):
        await it.join(FakeEngine("e2"))


async def test_a_new_engine_loads_what_is_committed_before_it_serves(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    newcomer = FakeEngine("e2", EngineState.STARTING)
    it.pool.members.append(newcomer)
    await it.join(newcomer)
    assert (newcomer.committed_version, newcomer.loaded) == (1, [3.0, 4.0])
    await it.push(2, 1)  # still STARTING, and yet not left behind
    assert it.versions() == [2, 2, 2]


async def test_before_the_first_push_there_is_nothing_to_load(start: StartWorld) -> None:
    it = start()
    newcomer = FakeEngine("e2", EngineState.STARTING)
    await it.join(newcomer)
    assert not newcomer.staging.is_set()


async def test_an_engine_that_starts_during_a_push_gets_that_push(start: StartWorld) -> None:
    it = start()
    it.first.commit_gate.clear()
    push = asyncio.create_task(it.push(1, 0))
    await it.first.committing.wait()
    newcomer = FakeEngine("e2", EngineState.STARTING)
    it.pool.members.append(newcomer)
    join = asyncio.create_task(it.join(newcomer))
    await asyncio.sleep(0)
    assert not newcomer.staging.is_set()
    it.first.commit_gate.set()
    await push
    await join
    assert it.versions() == [1, 1, 1]


@pytest.mark.parametrize(
    ("attribute", "error"),
    [
        ("stage_error", WeightVerificationError("does not fit")),
        ("commit_error", WeightCommitError("load failed")),
    ],
)
async def test_a_new_engine_that_cannot_load_is_told_to_the_pool(
    start: StartWorld, attribute: str, error: SlipstreamError
) -> None:
    it = start()
    await it.push(1, 0)
    newcomer = FakeEngine("e2", EngineState.STARTING)
    setattr(newcomer, attribute, error)
    with pytest.raises(type(error)):
        await it.join(newcomer)
    await it.push(2, 1)
    assert newcomer.committed_version == 0
