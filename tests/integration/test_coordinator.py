"""Weight pushes over real files, with engines that fail in every phase."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from shared.errors import (
    ConflictError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    UnavailableError,
    WeightCommitError,
    WeightTransferError,
    WeightVerificationError,
)
from shared.schemas.weights import PublishRequest, WeightManifest
from shared.types import EngineState
from tests.fakes.weight_push import FakeEngine, PushWorld, StartWorld, worlds


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


async def test_a_push_reaches_every_engine_and_leaves_one_file(start: StartWorld) -> None:
    it = start()
    response = await it.push(1, 0, (3.0, 4.0))
    assert it.versions() == [1, 1]
    assert it.first.loaded == it.second.loaded == [3.0, 4.0]
    assert [timings.engine_id for timings in response.engines] == ["e0", "e1"]
    assert [timings.stage_s for timings in response.engines] == [0.25, 0.25]
    assert (response.version, response.num_bytes, response.engines_removed) == (1, 8, [])
    assert it.files() == it.server_files(1)
    snapshot = it.coordinator.snapshot()
    assert snapshot is not None
    assert (snapshot.version, Path(snapshot.path).name) == (1, it.server_files(1)[0])


async def test_the_next_push_replaces_the_file_of_the_last(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0)
    await it.push(4, 1, (5.0, 6.0))
    assert it.coordinator.committed_version == 4
    assert it.first.loaded == [5.0, 6.0]
    assert it.files() == it.server_files(4, spare=1)


async def test_status_tells_versions_and_a_bounded_history(start: StartWorld) -> None:
    it = start(history_size=2)
    await it.push(1, 0)
    await it.push(2, 1)
    with pytest.raises(ConflictError):
        await it.push(9, 5)
    await it.first.drafter.ended()
    await it.second.drafter.ended()
    status = it.coordinator.status()
    assert status.committed_version == 2
    assert [(e.engine_id, e.target_version, e.drafter_version) for e in status.engines] == [
        ("e0", 2, 2),
        ("e1", 2, 2),
    ]
    assert [(entry.version, entry.committed) for entry in status.history] == [(2, True), (9, False)]
    assert "base_version 5" in (status.history[1].error or "")


async def test_a_push_is_answered_before_the_drafters_have_followed(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0)
    await it.second.drafter.ended()
    it.second.rebuild_gate.clear()
    answer = await asyncio.wait_for(it.push(2, 1), 5)
    assert [timings.requantize_s for timings in answer.engines] == [None, None]
    await it.first.drafter.ended()
    engines = it.coordinator.status().engines
    assert [(e.target_version, e.drafter_version, e.requantize_s) for e in engines] == [
        (2, 2, 0.5),
        (2, 1, None),
    ]
    it.second.rebuild_gate.set()
    await it.second.drafter.ended()
    assert it.coordinator.status().engines[1].drafter_version == 2


async def test_a_drafter_that_follows_slowly_takes_no_time_from_the_next_pushs_staging(
    start: StartWorld,
) -> None:
    it = start(stage_timeout_s=0.5)
    await it.push(1, 0)
    await it.first.drafter.ended()
    it.first.rebuild_gate.clear()
    await it.push(2, 1)
    push = asyncio.create_task(it.push(3, 2))
    await asyncio.sleep(0.8)
    assert not push.done()
    it.first.rebuild_gate.set()
    await asyncio.wait_for(push, 5)
    assert it.versions() == [3, 3]


async def test_a_paused_engine_takes_part_and_others_do_not(start: StartWorld) -> None:
    it = start()
    it.first.state = EngineState.PAUSED
    bystanders = [
        FakeEngine(state.value, state)
        for state in (EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD)
    ]
    it.pool.members += bystanders
    await it.push(1, 0)
    assert it.versions() == [1, 1, 0, 0, 0]


async def test_the_same_push_again_gets_the_same_answer(start: StartWorld) -> None:
    it = start()
    request = it.request(1, 0)
    first = await it.coordinator.publish(request)
    it.first.stage_error = EngineError("must not be asked again")
    assert await it.coordinator.publish(request) == first
    assert len(it.coordinator.status().history) == 1


@pytest.mark.parametrize(
    ("version", "base", "values"), [(2, 1, (9.0, 9.0)), (1, 0, (1.0, 2.0)), (3, 1, (1.0, 2.0))]
)
async def test_a_push_that_contradicts_the_state_is_a_conflict(
    start: StartWorld, version: int, base: int, values: tuple[float, float]
) -> None:
    it = start()
    await it.push(1, 0)
    await it.push(2, 1)
    with pytest.raises(ConflictError):
        await it.push(version, base, values)
    assert it.versions() == [2, 2]
    assert it.files() == it.server_files(2, spare=1)


def with_digest(manifest: WeightManifest, digest: str) -> WeightManifest:
    tensors = [manifest.tensors[0].model_copy(update={"digest": digest}), *manifest.tensors[1:]]
    return manifest.model_copy(update={"tensors": tensors})


@pytest.mark.parametrize(
    "damage",
    [
        lambda it, manifest: with_digest(manifest, "0" * 32),
        lambda it, manifest: manifest.model_copy(update={"tensors": manifest.tensors[:1]}),
        lambda it, manifest: (it.directory / manifest.segment).unlink() or manifest,
        lambda it, manifest: os.truncate(it.directory / manifest.segment, 20) or manifest,
        lambda it, manifest: it.write(2, (float("nan"), 0.0)),
        lambda it, manifest: it.write(2, (0.0, float("inf"))),
        lambda it, manifest: manifest.model_copy(update={"segment": "slipstream-link.safetensors"}),
    ],
    ids=["digest", "extra", "missing-file", "truncated", "nan", "inf", "symlink-out"],
)
async def test_a_damaged_push_is_refused_whole_and_the_next_one_works(
    start: StartWorld,
    tmp_path_factory: pytest.TempPathFactory,
    damage: Callable[[PushWorld, WeightManifest], WeightManifest],
) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    it.first.staging.clear()
    manifest = it.write(2)
    outside = tmp_path_factory.mktemp("outside") / "w.safetensors"
    outside.write_bytes((it.directory / manifest.segment).read_bytes())
    (it.directory / "slipstream-link.safetensors").symlink_to(outside)
    manifest = damage(it, manifest)
    with pytest.raises(WeightVerificationError):
        await it.coordinator.publish(PublishRequest(version=2, base_version=1, manifest=manifest))
    assert it.versions() == [1, 1]
    assert not it.first.staging.is_set()
    left_by_server = [name for name in it.files() if name.startswith("slipstream-server")]
    assert left_by_server == it.server_files(1)
    await it.push(2, 1, (7.0, 8.0))
    assert it.second.loaded == [7.0, 8.0]


async def test_one_engine_that_rejects_the_tensors_refuses_the_push_for_all(
    start: StartWorld,
) -> None:
    it = start()
    it.second.stage_error = WeightVerificationError("tensor 'b': shape [1], the model has [2]")
    with pytest.raises(WeightVerificationError, match=r"engine e1: tensor 'b'"):
        await it.push(1, 0)
    assert it.versions() == [0, 0]
    assert it.first.staged is None
    assert not it.first.committing.is_set()
    assert it.files() == []


@pytest.mark.parametrize("error", [EngineError("out of memory"), RuntimeError("a defect")])
async def test_an_engine_that_serves_and_cannot_stage_refuses_the_push(
    start: StartWorld, error: Exception
) -> None:
    it = start()
    it.first.stage_error = error
    it.first.discard_error = EngineError("neither can it discard")
    with pytest.raises(WeightTransferError, match="e0"):
        await it.push(1, 0)
    assert it.second.staged is None
    assert it.files() == []


async def test_an_engine_that_does_not_answer_in_time_refuses_the_push(start: StartWorld) -> None:
    it = start(stage_timeout_s=0.05)
    it.first.stage_gate.clear()
    with pytest.raises(WeightTransferError, match=r"weights\.stage_timeout_s 0\.05"):
        await it.push(1, 0)
    assert it.second.staged is None
    assert it.files() == []


async def test_an_engine_that_dies_while_staging_is_left_out(start: StartWorld) -> None:
    it = start()
    it.first.stage_error = EngineDeadError("gone")
    response = await it.push(1, 0)
    assert [timings.engine_id for timings in response.engines] == ["e1"]
    assert response.engines_removed == []
    assert it.versions() == [0, 1]


async def test_without_a_living_engine_a_push_has_to_wait(start: StartWorld) -> None:
    it = start()
    it.first.stage_error = it.second.stage_error = EngineDeadError("gone")
    with pytest.raises(UnavailableError):
        await it.push(1, 0)
    it.pool.members.clear()
    with pytest.raises(UnavailableError):
        await it.push(1, 0)
    assert it.coordinator.committed_version == 0
    assert it.files() == []


@pytest.mark.parametrize(
    "error", [WeightCommitError("load failed"), EngineDeadError("gone"), RuntimeError("a defect")]
)
async def test_an_engine_that_fails_its_commit_is_removed_and_the_push_holds(
    start: StartWorld, error: Exception
) -> None:
    it = start()
    it.first.commit_error = error
    response = await it.push(1, 0)
    assert response.engines_removed == ["e0"]
    assert [timings.engine_id for timings in response.engines] == ["e1"]
    assert it.first.state is EngineState.DEAD
    assert it.coordinator.committed_version == 1


async def test_an_engine_that_hangs_in_its_commit_is_poisoned(start: StartWorld) -> None:
    it = start(pause_timeout_s=0.02, commit_timeout_s=0.03)
    it.first.commit_gate.clear()
    response = await it.push(1, 0)
    assert response.engines_removed == ["e0"]
    assert it.first.state is EngineState.DEAD


async def test_a_commit_that_fails_everywhere_keeps_the_old_version(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    it.first.commit_error = it.second.commit_error = WeightCommitError("load failed")
    with pytest.raises(WeightCommitError, match=r"e0: load failed; e1: load failed"):
        await it.push(2, 1)
    assert it.coordinator.committed_version == 1
    assert it.files() == it.server_files(1)
    replacement = FakeEngine("e2", EngineState.STARTING)
    await it.join(replacement)
    assert (replacement.committed_version, replacement.loaded) == (1, [3.0, 4.0])


async def test_version_and_base_are_checked_against_each_other(start: StartWorld) -> None:
    it = start()
    with pytest.raises(InvalidRequestError, match="base_version"):
        await it.push(1, 1)
