"""One engine's side of pushes, over its Ray actor: what a handle asks of it, and in which order."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from rollout_server.engine.actor_calls import ActorCalls
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.background_rebuild import BackgroundRebuild
from rollout_server.engine.standstill import StandstillLimits
from shared.config.weights import WeightsConfig
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import DrafterRebuild, EngineState


class WeightCalls:
    """Belongs to one handle.

    Args:
        calls: the handle's; of its lifecycle a push moves SERVING to SYNCING and back.
    """

    def __init__(self, spec: EngineSpec, weights: WeightsConfig, calls: ActorCalls) -> None:
        self.committed_version = 0
        self.drafter = BackgroundRebuild()
        self._spec = spec
        self._weights = weights
        self._calls = calls
        self._state_before_sync = EngineState.SERVING
        self._stage_s: dict[int, float] = {}

    async def stage(self, actor: Any, version: int, path: str, manifest: WeightManifest) -> float:
        await self._drafter_rebuilt()
        seconds: float = await self._calls.call(
            actor.stage.remote(version, path, manifest),
            f"to stage version {version}",
            self._weights.stage_timeout_s,
        )
        self._stage_s[version] = seconds
        return seconds

    async def stage_initial(self, actor: Any) -> float:
        await self._drafter_rebuilt()
        seconds: float = await self._calls.call(
            actor.stage_initial.remote(),
            "to stage the model directory's weights",
            self._weights.stage_timeout_s,
        )
        return seconds

    def forget_staged(self, version: int) -> None:
        self._stage_s.pop(version, None)

    async def load(self, actor: Any, version: int) -> None:
        await self._drafter_rebuilt()
        lifecycle = self._calls.lifecycle
        # A joining engine loads before it ever serves; it has nothing to pause.
        if lifecycle.state in (EngineState.SERVING, EngineState.PAUSED):
            self._state_before_sync = lifecycle.state
            lifecycle.move(EngineState.SYNCING)
        await self._or_die(
            actor,
            actor.load_weights.remote(
                version, self._weights.pause_mode, self._weights.recompute_kv
            ),
            f"to load version {version}",
            self._weights.pause_timeout_s + self._weights.commit_timeout_s,
        )
        self.committed_version = version

    async def resume(self, actor: Any) -> EngineCommitTimings:
        self._calls.check_alive()
        timeout_s = self._weights.commit_timeout_s
        timings: EngineCommitTimings = await self._or_die(
            actor, actor.resume.remote(), "to resume", timeout_s
        )
        if self._calls.lifecycle.state is EngineState.SYNCING:
            self._calls.lifecycle.move(self._state_before_sync)
        rebuild = self._or_die(
            actor,
            actor.rebuild_drafter.remote(),
            "to rebuild its drafter (weights.rebuild_timeout_s)",
            self._weights.rebuild_timeout_s,
        )
        self.drafter.begin(rebuild)
        if self._spec.drafter.rebuild is DrafterRebuild.IN_PAUSE:
            await self._drafter_rebuilt()  # it was: only its seconds are asked for
        return timings.model_copy(
            update={
                "stage_s": self._stage_s.pop(self.committed_version, 0.0),
                "requantize_s": self.drafter.requantize_s,
            }
        )

    async def audit(self, actor: Any, path: str) -> EngineAudit:
        await self._drafter_rebuilt()
        report: EngineAudit = await self._calls.call(
            actor.audit.remote(path),
            "to compare its weights (weights.audit_timeout_s)",
            self._weights.audit_timeout_s,
        )
        return report

    async def _drafter_rebuilt(self) -> None:
        await self.drafter.ended()
        self._calls.check_alive()

    async def _or_die(
        self, actor: Any, reference: Awaitable[Any], purpose: str, timeout_s: float
    ) -> Any:
        """A call after whose failure nobody knows what the engine's weights are, and in which no
        status tells whether it is alive."""
        limits = StandstillLimits.of(self._spec.engine, self._spec.device)
        watch = self._calls.until_standstill(actor, limits)
        return await self._calls.call_or_die(reference, purpose, timeout_s, watch)
