"""``EngineHandle`` over a Ray actor: state, timeouts, foreign errors turned into ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import replace
from typing import Any

import ray

from rollout_server.engine.actor_calls import ActorCalls, end_actor
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.cluster import RayEngineHost
from rollout_server.engine.drafter_state import DrafterState
from rollout_server.engine.facts import EngineFacts
from rollout_server.engine.footprint import Footprint, remove_footprint
from rollout_server.engine.host_sweep import sweep_host
from rollout_server.engine.operator_pause import OperatorPause
from rollout_server.engine.protocol import (
    GenerateDelta,
    GenerateRequest,
    GenerateResult,
    KnownTokens,
    SampleProgress,
)
from rollout_server.engine.standstill import StandstillLimits
from rollout_server.engine.status import engine_status
from rollout_server.engine.vllm_metrics import MetricText
from rollout_server.engine.weight_calls import WeightCalls
from shared.config.weights import WeightsConfig
from shared.schemas.engines import EngineStatus
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import EngineState, PauseMode

CONTROL_TIMEOUT_S = 30.0
"""For calls that only read or set something between two engine steps."""


class RayEngineHandle:
    """One engine. Implements ``engine.protocol.EngineHandle``.

    From the moment its state is DEAD every call raises ``EngineDeadError``, also those that wait.
    """

    def __init__(self, spec: EngineSpec, host: RayEngineHost, weights: WeightsConfig) -> None:
        self.spec = spec
        self.host = host
        self._actor: Any = None
        self._calls = ActorCalls(spec.engine_id)
        self._lifecycle = self._calls.lifecycle
        self._weights = WeightCalls(spec, weights, self._calls)
        self._facts: EngineFacts | None = None
        self._footprint: Footprint | None = None
        self._node_id = ""
        self._pause = OperatorPause(
            spec.engine_id, self._lifecycle, weights.pause_timeout_s + weights.commit_timeout_s
        )
        self._created_s = time.monotonic()

    @property
    def engine_id(self) -> str:
        return self.spec.engine_id

    @property
    def state(self) -> EngineState:
        return self._lifecycle.state

    @property
    def error(self) -> str | None:
        return self._lifecycle.error

    @property
    def committed_version(self) -> int:
        return self._weights.committed_version

    @property
    def drafter(self) -> DrafterState:
        return self._weights.drafter

    @property
    def node_id(self) -> str:
        return self._node_id

    @property
    def facts(self) -> EngineFacts | None:
        """Known once the engine has started."""
        return self._facts

    @property
    def footprint(self) -> Footprint | None:
        """Processes and files of the engine; known once it has started."""
        return self._footprint

    async def start(self) -> EngineFacts:
        """Load and warm up; the state stays STARTING until the pool says SERVING.

        Raises:
            EngineError: vLLM's reason, or ``engine.start_timeout_s`` passed.
        """
        began_s = time.monotonic()
        self._actor = await self.host.create()
        facts: EngineFacts = await self._call(
            self._actor.start.remote(), "to start", self.spec.engine.start_timeout_s
        )
        self._facts = replace(facts, start_up_s=time.monotonic() - began_s)
        where = self._actor.__ray_call__.remote(_node_of)
        self._node_id = await self._control(where, "for its node")
        # Asked for now as well: an engine that is killed later cannot tell any more.
        self._footprint = await self._control(
            self._actor.footprint.remote(), "to list its processes"
        )
        return self._facts

    def serve(self) -> None:
        """STARTING -> SERVING (PAUSED where generation is): warmed up, on the committed version."""
        self._lifecycle.move(self._pause.serve_as)

    def begin_drain(self) -> None:
        """No new requests from here on."""
        self._lifecycle.move(EngineState.DRAINING)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self._check_alive()
        timeout_s = self.spec.engine.generate_timeout_s
        purpose = f"to generate {request.request_id} (engine.generate_timeout_s)"
        finished = False
        try:
            result: GenerateResult = await self._call(
                self._actor.generate.remote(request), purpose, timeout_s
            )
            finished = True
            return result
        finally:
            # Nobody waits for it any more: its KV blocks are needed elsewhere.
            if not finished and self.state is not EngineState.DEAD:
                self._actor.abort.remote(request.request_id)

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        self._check_alive()
        timeout_s = self.spec.engine.generate_timeout_s
        purpose = f"for the next token of {request.request_id} (engine.generate_timeout_s)"
        stream = self._actor.generate_stream.options(num_returns="streaming").remote(request)
        while True:
            try:
                reference = await self._call(stream.__anext__(), purpose, timeout_s)
            except StopAsyncIteration:
                return
            yield await self._call(reference, "to stream", CONTROL_TIMEOUT_S)

    async def abort(self, request_id: str) -> None:
        await self._control(self._actor.abort.remote(request_id), "to abort")

    async def progress(self, known: Mapping[str, KnownTokens]) -> dict[str, list[SampleProgress]]:
        news: dict[str, list[SampleProgress]] = await self._control(
            self._actor.progress.remote(dict(known)), "for the progress of its requests"
        )
        return news

    async def status(self) -> EngineStatus:
        facts = self._facts
        load: dict[str, Any] = {}
        if facts is not None and self.state is not EngineState.DEAD:
            load = await self._control(self._actor.load.remote(), "for its load")
        return engine_status(
            self.spec,
            facts,
            load,
            state=self.state,
            error=self.error,
            committed_version=self._weights.committed_version,
            node_id=self._node_id,
            uptime_s=time.monotonic() - self._created_s,
        )

    async def until_standstill(self) -> str:
        # An actor that does not answer is not known to stand still; its late statuses count.
        limits = replace(
            StandstillLimits.of(self.spec.engine, self.spec.device), max_unanswered=None
        )
        return await self._calls.until_standstill(self._actor, limits)

    async def speculation(self, since_step: int) -> EngineSpeculation:
        report: EngineSpeculation = await self._control(
            self._actor.speculation.remote(since_step), "for its speculation state"
        )
        return report

    async def set_speculation(self, patch: SpeculationPatch) -> None:
        await self._control(self._actor.set_speculation.remote(patch), "to change speculation")

    async def vllm_metrics(self) -> tuple[MetricText, ...]:
        families: tuple[MetricText, ...] = await self._control(
            self._actor.vllm_metrics.remote(), "for vLLM's metrics"
        )
        return families

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        return await self._weights.stage(self._actor, version, path, manifest)

    async def stage_initial(self) -> float:
        return await self._weights.stage_initial(self._actor)

    async def discard(self, version: int) -> None:
        self._weights.forget_staged(version)
        await self._control(self._actor.discard.remote(version), "to discard a staged version")

    async def load_weights(self, version: int) -> None:
        await self._weights.load(self._actor, version)

    async def resume(self) -> EngineCommitTimings:
        return await self._weights.resume(self._actor)

    async def audit(self, path: str) -> EngineAudit:
        return await self._weights.audit(self._actor, path)

    async def pause_generation(self, mode: PauseMode) -> None:
        if not await self._pause.change(EngineState.PAUSED):
            return
        waits = mode is PauseMode.WAIT
        timeout_s = self.spec.engine.generate_timeout_s if waits else CONTROL_TIMEOUT_S
        purpose = f"to pause, mode {mode.value}" + waits * " (engine.generate_timeout_s)"
        await self._call(self._actor.pause_generation.remote(mode), purpose, timeout_s)

    async def resume_generation(self) -> None:
        if await self._pause.change(EngineState.SERVING):
            await self._control(self._actor.resume_generation.remote(), "to resume generation")

    def condemn(self, reason: str) -> None:
        self._calls.die(reason)

    async def stop(self, reason: str) -> None:
        """Shut vLLM down, then the actor, then remove whatever of them is still there."""
        self._calls.die(reason)
        if self._actor is not None:
            self._footprint = await end_actor(self._actor, self._footprint)
        self.host.remove()
        if self._footprint is not None:
            await asyncio.to_thread(remove_footprint, self._footprint)
        await asyncio.to_thread(sweep_host)

    def _check_alive(self) -> None:
        self._calls.check_alive()

    async def _control(self, reference: Awaitable[Any], purpose: str) -> Any:
        return await self._call(reference, purpose, CONTROL_TIMEOUT_S)

    async def _call(self, reference: Awaitable[Any], purpose: str, timeout_s: float) -> Any:
        return await self._calls.call(reference, purpose, timeout_s)


def _node_of(_actor: Any) -> str:
    """Runs inside the actor."""
    return str(ray.get_runtime_context().get_node_id())
