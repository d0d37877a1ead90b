"""A weight coordinator over engines that can be told to fail, and a trainer's files beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np

from rollout_server.engine.background_rebuild import BackgroundRebuild
from rollout_server.engine.drafter_state import RebuiltDrafter
from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.coordinator import WeightCoordinator
from rollout_server.weights.recovery import recover
from rollout_server.weights.transports.node_files import NodeFiles
from rollout_server.weights.transports.spread import ClusterNodes
from shared.clock import SystemClock
from shared.config.weights import WeightsConfig
from shared.errors import EngineDeadError, SlipstreamError
from shared.schemas.weights import (
    EngineAudit,
    EngineCommitTimings,
    PublishRequest,
    PublishResponse,
    WeightManifest,
)
from shared.types import EngineState
from shared.weight_claims import CLAIM_SUFFIX
from shared.weights import SegmentKind, build_manifest, segment_name, write_safetensors


class FakeEngine:
    """Keeps the contract of ``EngineHandle`` for pushes; each phase can be told to fail or wait."""

    def __init__(self, engine_id: str, state: EngineState = EngineState.SERVING) -> None:
        self.engine_id = engine_id
        self.state = state
        self.node_id = ""
        self.committed_version = 0
        self.staged: int | None = None
        self.loaded: list[float] = []
        self.stage_error: BaseException | None = None
        self.commit_error: BaseException | None = None
        self.resume_error: SlipstreamError | None = None
        self.initial_error: SlipstreamError | None = None
        self.audit_error: SlipstreamError | None = None
        self.audited: list[str] = []
        """Paths it was compared with."""
        self.different: list[str] = []
        """What an audit will find."""
        self.is_paused = False
        self.has_loaded = asyncio.Event()
        self.loads: list[int] = []
        """Versions loaded, one after the other."""
        self.served: list[int] = []
        """Versions it generated with."""
        self.discard_error: SlipstreamError | None = None
        self.stage_gate = asyncio.Event()
        self.commit_gate = asyncio.Event()
        self.stage_gate.set()
        self.commit_gate.set()
        self.staging = asyncio.Event()
        self.committing = asyncio.Event()
        self.drafter = BackgroundRebuild()
        self.rebuild_gate = asyncio.Event()
        self.rebuild_gate.set()
        """Clear it, and the drafter does not follow until it is set."""
        self._path = ""
        self.staged_paths: list[str] = []

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        self.staging.set()
        await self.drafter.ended()
        await self.stage_gate.wait()
        if isinstance(self.stage_error, EngineDeadError):
            self.state = EngineState.DEAD
        if self.stage_error is not None:
            raise self.stage_error
        self.staged, self._path = version, path
        self.staged_paths.append(path)
        return 0.25

    async def stage_initial(self) -> float:
        if self.initial_error is not None:
            raise self.initial_error
        self.staged, self._path = 0, ""
        return 0.25

    async def load_weights(self, version: int) -> None:
        self.committing.set()
        try:
            await self.commit_gate.wait()
            if self.commit_error is not None and version > self.committed_version:
                raise self.commit_error
            assert self.staged == version, "loads follow a stage of the same version"
            self.loaded = np.fromfile(self._path, np.float32)[-2:].tolist() if self._path else []
        except BaseException:
            self.state = EngineState.DEAD
            raise
        self.is_paused = True
        self.has_loaded.set()
        self.loads.append(version)
        self.committed_version, self.staged = version, None

    async def resume(self) -> EngineCommitTimings:
        assert self.is_paused, "resumes follow a load"
        if self.resume_error is not None:
            self.state = EngineState.DEAD
            raise self.resume_error
        self.is_paused = False
        self.served.append(self.committed_version)
        self.drafter.begin(self._rebuild(self.committed_version))
        return EngineCommitTimings(
            engine_id=self.engine_id,
            stage_s=0.25,
            pause_s=0.0,
            load_s=0.0,
            requantize_s=None,
            resume_s=0.0,
            paused_s=0.0,
        )

    async def _rebuild(self, version: int) -> RebuiltDrafter:
        await self.rebuild_gate.wait()
        return RebuiltDrafter(version=version, requantize_s=0.5)

    async def audit(self, path: str) -> EngineAudit:
        self.audited.append(path)
        if self.audit_error is not None:
            raise self.audit_error
        return EngineAudit(
            engine_id=self.engine_id,
            version=self.committed_version,
            num_equal=2,
            num_skipped=0,
            different=self.different,
            audit_s=0.0,
        )

    def condemn(self, reason: str) -> None:
        self.state = EngineState.DEAD

    async def discard(self, version: int) -> None:
        if self.discard_error is not None:
            raise self.discard_error
        self.staged = None


class FakePool:
    def __init__(self, *engines: FakeEngine) -> None:
        self.members = list(engines)

    def engines(self) -> Sequence[FakeEngine]:
        return list(self.members)


class PushWorld:
    """A coordinator over two serving engines, and a trainer's side of the directory."""

    def __init__(
        self,
        directory: Path,
        state_dir: Path,
        nodes: ClusterNodes | None = None,
        **settings: object,
    ) -> None:
        self.directory = directory
        self.first, self.second = FakeEngine("e0"), FakeEngine("e1")
        self.pool = FakePool(self.first, self.second)
        config = WeightsConfig.model_validate({"shared_memory_dir": str(directory)} | settings)
        self.transport = config.transport
        pool: EnginePool = self.pool  # type: ignore[assignment]  # only what pushes use
        self.ledger = CommitLedger(state_dir)
        try:
            recovered = recover(self.ledger, config.lost_snapshot, config.directory)
        except BaseException:
            self.ledger.close()
            raise
        files = None if nodes is None else NodeFiles(nodes, config, "test/receiver")
        self.coordinator = WeightCoordinator(
            pool, config, SystemClock(), self.ledger, recovered, "model", files
        )

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
            version=version,
            base_version=base,
            transport=self.transport,
            manifest=self.write(version, values),
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

    def server_files(self, *versions: int, spare: int | None = None) -> list[str]:
        """What the server keeps, and the version whose memory it left for the next."""
        names = [segment_name(os.getpid(), version, SegmentKind.SERVER) for version in versions]
        spares = [] if spare is None else [segment_name(os.getpid(), spare, SegmentKind.SPARE)]
        return sorted(names + [name + CLAIM_SUFFIX for name in names] + spares)

    def versions(self) -> list[int]:
        return [engine.committed_version for engine in self.pool.members]


StartWorld = Callable[..., PushWorld]
"""Settings of ``WeightsConfig`` by name; machines besides the server's own."""


@contextlib.asynccontextmanager
async def worlds(directory: Path) -> AsyncIterator[StartWorld]:
    """Make worlds over one directory, with one record; close their coordinators at the end."""
    started: list[PushWorld] = []
    shared_memory = directory / "shm"
    shared_memory.mkdir()

    def make(nodes: ClusterNodes | None = None, **settings: object) -> PushWorld:
        started.append(PushWorld(shared_memory, directory / "state", nodes, **settings))
        return started[-1]

    yield make
    for world in started:
        await world.coordinator.close()
