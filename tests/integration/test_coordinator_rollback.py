"""All or nothing: when engines fail to load, and that none generates before the commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.errors import EngineError, WeightCommitError, WeightTransferError
from shared.schemas.weights import PushStatus
from shared.types import EngineState, PushPhase
from tests.fakes.weight_push import StartWorld, worlds

PHASES = {"verifying", "staging", "loading", "recording", "resume"}


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


@pytest.mark.parametrize("failing", ["e0", "e1"])
async def test_under_the_policy_all_one_failure_rolls_every_engine_back(
    start: StartWorld, failing: str
) -> None:
    it = start(commit_policy="all")
    await it.push(1, 0, (3.0, 4.0))
    bad, good = sorted(it.pool.members, key=lambda engine: engine.engine_id != failing)
    bad.commit_error = WeightCommitError("load failed")
    with pytest.raises(WeightCommitError, match=rf"{failing}: load failed.*went back to version 1"):
        await it.push(2, 1, (5.0, 6.0))
    assert it.coordinator.committed_version == 1
    assert (good.loads, good.loaded, good.is_paused) == ([1, 2, 1], [3.0, 4.0], False)
    assert good.served == [1, 1], "nothing was sampled under the version that was taken back"
    assert bad.state is EngineState.DEAD
    assert it.files() == it.server_files(1)
    it.pool.members.remove(bad)
    await it.push(2, 1, (5.0, 6.0))
    assert good.loaded == [5.0, 6.0]


async def test_the_first_push_of_all_is_rolled_back_to_the_model_directory(
    start: StartWorld,
) -> None:
    it = start(commit_policy="all")
    it.second.commit_error = WeightCommitError("load failed")
    with pytest.raises(WeightCommitError, match="e0 went back to version 0"):
        await it.push(1, 0)
    assert (it.first.loads, it.first.is_paused) == ([1, 0], False)
    assert it.files() == []


async def test_an_engine_that_cannot_go_back_is_replaced(start: StartWorld) -> None:
    it = start(commit_policy="all")
    it.first.initial_error = EngineError("no files")
    it.second.commit_error = WeightCommitError("load failed")
    with pytest.raises(WeightCommitError, match="no engine is left that serves version 0"):
        await it.push(1, 0)
    assert it.first.state is EngineState.DEAD
    assert it.first.served == []


async def test_too_few_engines_for_the_quorum_roll_back(start: StartWorld) -> None:
    it = start(commit_quorum=0.6)
    it.second.commit_error = WeightCommitError("load failed")
    with pytest.raises(WeightCommitError, match="1 of 2 engines failed"):
        await it.push(1, 0)
    assert it.coordinator.committed_version == 0


async def test_no_engine_generates_before_all_have_loaded_and_it_is_recorded(
    start: StartWorld,
) -> None:
    it = start()
    it.second.commit_gate.clear()
    push = asyncio.create_task(it.push(1, 0))
    await it.second.committing.wait()
    await it.first.has_loaded.wait()
    assert it.first.loads == [1]
    await asyncio.sleep(0.01)
    assert it.first.is_paused
    status = it.coordinator.status()
    assert status.committed_version == 0
    assert status.push == PushStatus(version=1, phase=PushPhase.LOADING)
    it.second.commit_gate.set()
    response = await push
    assert not it.first.is_paused
    assert it.coordinator.status().push == PushStatus(version=1, phase=PushPhase.COMMITTED)
    assert set(response.phases_s) == PHASES


async def test_an_engine_that_cannot_resume_is_replaced_and_the_push_holds(
    start: StartWorld,
) -> None:
    it = start()
    it.first.resume_error = WeightCommitError("stuck")
    response = await it.push(1, 0)
    assert response.engines_removed == ["e0"]
    assert [timings.engine_id for timings in response.engines] == ["e1"]
    assert it.coordinator.committed_version == 1


async def test_a_commit_that_cannot_be_recorded_is_rolled_back(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    record = it.ledger.record_path
    record.with_suffix(".partial").mkdir()  # the record cannot be written
    with pytest.raises(WeightTransferError, match=r"cannot be recorded.*went back to version 1"):
        await it.push(2, 1, (5.0, 6.0))
    assert it.first.loaded == it.second.loaded == [3.0, 4.0]
    assert it.first.served == [1, 1]
    record.with_suffix(".partial").rmdir()
    await it.push(2, 1, (5.0, 6.0))
    assert it.ledger.read().version == 2
