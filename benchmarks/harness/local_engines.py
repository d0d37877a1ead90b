"""Engines in this process behind the interface that the weight coordinator knows."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.background_rebuild import BackgroundRebuild
from shared.config.weights import WeightsConfig
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import EngineState


class LocalHandle:
    """What ``engine.protocol.EngineHandle`` promises for pushes, without Ray."""

    def __init__(self, engine_id: str, actor: EngineActor, config: WeightsConfig) -> None:
        self.engine_id = engine_id
        self.state = EngineState.SERVING
        self.committed_version = 0
        self.drafter = BackgroundRebuild()
        self._actor = actor
        self._config = config

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        await self.drafter.ended()
        return await self._actor.stage(version, path, manifest)

    async def stage_initial(self) -> float:
        return await self._actor.stage_initial()

    async def load_weights(self, version: int) -> None:
        await self.drafter.ended()
        await self._actor.load_weights(version, self._config.pause_mode, self._config.recompute_kv)
        self.committed_version = version

    async def resume(self) -> EngineCommitTimings:
        timings = await self._actor.resume()
        self.drafter.begin(self._actor.rebuild_drafter())
        return timings.model_copy(update={"requantize_s": None})

    async def discard(self, version: int) -> None:
        await self._actor.discard(version)

    async def audit(self, path: str) -> EngineAudit:
        await self.drafter.ended()
        return await self._actor.audit(path)

    def condemn(self, reason: str) -> None:
        self.state = EngineState.DEAD


class LocalPool:
    """The engines that take part; ``members`` may change between pushes."""

    def __init__(self, members: Sequence[LocalHandle]) -> None:
        self.members = list(members)

    def engines(self) -> Sequence[LocalHandle]:
        return list(self.members)
