"""The weight coordinator over real files and engines that fail in every phase."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.weights.coordinator import WeightCoordinator
from shared.clock import SystemClock
from shared.config.server import WeightsConfig
from shared.errors import (
    ConflictError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    SlipstreamError,
    UnavailableError,
    WeightCommitError,
    WeightTransferError,
    WeightVerificationError,
)
from shared.schemas.weights import (
    EngineCommitTimings,
    PublishRequest,
    PublishResponse,
    WeightManifest,
)
from shared.types import EngineState
from shared.weights import SegmentKind, build_manifest, segment_name, write_safetensors


class FakeEngine:
    """Keeps the contract of ``EngineHandle`` for pushes; each phase can be told to fail or wait."""

    def __init__(self, engine_id: str, state: EngineState = EngineState.SERVING) -> None:
        self.engine_id = engine_id
        self.state = state
        self.committed_version = 0
        self.staged: int | None = None
        self.loaded: list[float] = []
        self.stage_error: BaseException | None = None
        self.commit_error: BaseException | None = None
        self.discard_error: SlipstreamError | None = None
        self.stage_gate = asyncio.Event()
        self.commit_gate = asyncio.Event()
        self.stage_gate.set()
        self.commit_gate.set()
        self.staging = asyncio.Event()
        self.committing = asyncio.Event()
        self._path = ""

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        self.staging.set()
        await self.stage_gate.wait()
        if isinstance(self.stage_error, EngineDeadError):
            self.state = EngineState.DEAD
        if self.stage_error is not None:
            raise self.stage_error
        self.staged, self._path = version, path
        return 0.25

    async def commit(self, version: int) -> EngineCommitTimings:
        self.committing.set()
        try:
            await self.commit_gate.wait()
            if self.commit_error is not None:
                raise self.commit_error
            assert self.staged == version, "commits follow a stage of the same version"
            self.loaded = np.fromfile(self._path, np.float32)[-2:].tolist()
        except BaseException:
            self.state = EngineState.DEAD
            raise
        self.committed_version, self.staged = version, None
        return EngineCommitTimings(
            engine_id=self.engine_id,
            stage_s=0.0,
            pause_s=0.0,
            load_s=0.0,
            requantize_s=0.0,
            resume_s=0.0,
            paused_s=0.0,
        )

    async def discard(self, version: int) -> None:
        if self.discard_error is not None:
            raise self.discard_error
        self.staged = None


class FakePool:
    def __init__(self, *engines: FakeEngine) -> None:
        self.members = list(engines)

    def engines(self) -> Sequence[FakeEngine]:
        return list(self.members)


class Fixture:
    """A coordinator over two serving engines, and a trainer's side of the directory."""

    def __init__(self, directory: Path, **settings: float) -> None:
        self.directory = directory
        self.first, self.second = FakeEngine("e0"), FakeEngine("e1")
        self.pool = FakePool(self.first, self.second)
        config = WeightsConfig.model_validate({"shared_memory_dir": str(directory)} | settings)
        pool: EnginePool = self.pool  # type: ignore[assignment]  # only what pushes use
        self.coordinator = WeightCoordinator(pool, config, SystemClock())

    def write(self, version: int, values: tuple[float, float] = (1.0, 2.0)) -> WeightManifest:
        """Pretend to be a trainer: its segment, under its own name."""
        path = self.directory / segment_name(os.getpid(), version)
        write_safetensors(
            path,
            [
                ("a", "F32", (1,), np.float32([values[0]])),
                ("b", "F32", (1,), np.float32([values[1]])),
            ],
        )
        return build_manifest(path)

    def request(
        self, version: int, base: int, values: tuple[float, float] = (1.0, 2.0)
    ) -> PublishRequest:
        return PublishRequest(
            version=version, base_version=base, manifest=self.write(version, values)
        )

    async def push(
        self, version: int, base: int, values: tuple[float, float] = (1.0, 2.0)
    ) -> PublishResponse:
        """Publish and, as trainers do, remove the trainer's name of the file."""
        request = self.request(version, base, values)
        try:
            return await self.coordinator.publish(request)
        finally:
            (self.directory / request.manifest.segment).unlink()

    async def join(self, engine: FakeEngine) -> None:
        handle: EngineHandle = engine  # type: ignore[assignment]  # only what pushes use
        await self.coordinator.bring_up_to_date(handle)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def server_files(self, *versions: int) -> list[str]:
        return [segment_name(os.getpid(), version, SegmentKind.SERVER) for version in versions]

    def versions(self) -> list[int]:
        return [engine.committed_version for engine in self.pool.members]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Fixture]]:
    started = []

    def make(**settings: float) -> Fixture:
        started.append(Fixture(tmp_path, **settings))
        return started[-1]

    yield make
    for fixture in started:
        await fixture.coordinator.close()


Start = Callable[..., Fixture]


async def test_a_push_reaches_every_engine_and_leaves_one_file(start: Start) -> None:
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


async def test_the_next_push_replaces_the_file_of_the_last(start: Start) -> None:
    it = start()
    await it.push(1, 0)
    await it.push(4, 1, (5.0, 6.0))
    assert it.coordinator.committed_version == 4
    assert it.first.loaded == [5.0, 6.0]
    assert it.files() == it.server_files(4)


async def test_status_tells_versions_and_a_bounded_history(start: Start) -> None:
    it = start(history_size=2)
    await it.push(1, 0)
    await it.push(2, 1)
    with pytest.raises(ConflictError):
        await it.push(9, 5)
    status = it.coordinator.status()
    assert status.committed_version == 2
    assert [(e.engine_id, e.target_version, e.drafter_version) for e in status.engines] == [
        ("e0", 2, 2),
        ("e1", 2, 2),
    ]
    assert [(entry.version, entry.committed) for entry in status.history] == [(2, True), (9, False)]
    assert "base_version 5" in (status.history[1].error or "")


async def test_a_paused_engine_takes_part_and_others_do_not(start: Start) -> None:
    it = start()
    it.first.state = EngineState.PAUSED
    bystanders = [
        FakeEngine(state.value, state)
        for state in (EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD)
    ]
    it.pool.members += bystanders
    await it.push(1, 0)
    assert it.versions() == [1, 1, 0, 0, 0]


async def test_the_same_push_again_gets_the_same_answer(start: Start) -> None:
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
    start: Start, version: int, base: int, values: tuple[float, float]
) -> None:
    it = start()
    await it.push(1, 0)
    await it.push(2, 1)
    with pytest.raises(ConflictError):
        await it.push(version, base, values)
    assert it.versions() == [2, 2]
    assert it.files() == it.server_files(2)


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
    start: Start,
    tmp_path_factory: pytest.TempPathFactory,
    damage: Callable[[Fixture, WeightManifest], WeightManifest],
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


async def test_one_engine_that_rejects_the_tensors_refuses_the_push_for_all(start: Start) -> None:
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
    start: Start, error: Exception
) -> None:
    it = start()
    it.first.stage_error = error
    it.first.discard_error = EngineError("neither can it discard")
    with pytest.raises(WeightTransferError, match="e0"):
        await it.push(1, 0)
    assert it.second.staged is None
    assert it.files() == []


async def test_an_engine_that_does_not_answer_in_time_refuses_the_push(start: Start) -> None:
    it = start(stage_timeout_s=0.05)
    it.first.stage_gate.clear()
    with pytest.raises(WeightTransferError, match=r"weights\.stage_timeout_s 0\.05"):
        await it.push(1, 0)
    assert it.second.staged is None
    assert it.files() == []


async def test_an_engine_that_dies_while_staging_is_left_out(start: Start) -> None:
    it = start()
    it.first.stage_error = EngineDeadError("gone")
    response = await it.push(1, 0)
    assert [timings.engine_id for timings in response.engines] == ["e1"]
    assert response.engines_removed == []
    assert it.versions() == [0, 1]


async def test_without_a_living_engine_a_push_has_to_wait(start: Start) -> None:
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
    start: Start, error: Exception
) -> None:
    it = start()
    it.first.commit_error = error
    response = await it.push(1, 0)
    assert response.engines_removed == ["e0"]
    assert [timings.engine_id for timings in response.engines] == ["e1"]
    assert it.first.state is EngineState.DEAD
    assert it.coordinator.committed_version == 1


async def test_an_engine_that_hangs_in_its_commit_is_poisoned(start: Start) -> None:
    it = start(pause_timeout_s=0.02, commit_timeout_s=0.03)
    it.first.commit_gate.clear()
    response = await it.push(1, 0)
    assert response.engines_removed == ["e0"]
    assert it.first.state is EngineState.DEAD


async def test_a_commit_that_fails_everywhere_keeps_the_old_version(start: Start) -> None:
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


async def test_an_engine_that_began_to_drain_is_not_committed_on(start: Start) -> None:
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


async def test_concurrent_pushes_run_one_after_the_other(start: Start) -> None:
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
    assert it.files() == it.server_files(3)


async def test_a_push_does_not_wait_for_ever_for_another(start: Start) -> None:
    it = start(lock_timeout_s=0.05)
    it.first.stage_gate.clear()
    first = asyncio.create_task(it.push(1, 0))
    await it.first.staging.wait()
    with pytest.raises(UnavailableError, match=r"weights\.lock_timeout_s 0\.05"):
        await it.push(2, 0)
    it.first.stage_gate.set()
    assert (await first).version == 1


async def test_a_caller_that_hangs_up_does_not_stop_the_push(start: Start) -> None:
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


async def test_closing_in_the_middle_of_a_push_leaves_nothing_behind(start: Start) -> None:
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


async def test_a_new_engine_loads_what_is_committed_before_it_serves(start: Start) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    newcomer = FakeEngine("e2", EngineState.STARTING)
    it.pool.members.append(newcomer)
    await it.join(newcomer)
    assert (newcomer.committed_version, newcomer.loaded) == (1, [3.0, 4.0])
    await it.push(2, 1)  # still STARTING, and yet not left behind
    assert it.versions() == [2, 2, 2]


async def test_before_the_first_push_there_is_nothing_to_load(start: Start) -> None:
    it = start()
    newcomer = FakeEngine("e2", EngineState.STARTING)
    await it.join(newcomer)
    assert not newcomer.staging.is_set()


async def test_an_engine_that_starts_during_a_push_gets_that_push(start: Start) -> None:
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
    start: Start, attribute: str, error: SlipstreamError
) -> None:
    it = start()
    await it.push(1, 0)
    newcomer = FakeEngine("e2", EngineState.STARTING)
    setattr(newcomer, attribute, error)
    with pytest.raises(type(error)):
        await it.join(newcomer)
    await it.push(2, 1)
    assert newcomer.committed_version == 0


async def test_version_and_base_are_checked_against_each_other(start: Start) -> None:
    it = start()
    with pytest.raises(InvalidRequestError, match="base_version"):
        await it.push(1, 1)
