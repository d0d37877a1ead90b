"""An engine in memory: deterministic tokens, and knobs to block, fail, die and delay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from rollout_server.engine.drafter_state import CurrentDrafter
from rollout_server.engine.protocol import (
    GenerateDelta,
    GeneratedSample,
    GenerateRequest,
    GenerateResult,
    GenerateTimings,
    KnownTokens,
    SampleProgress,
)
from rollout_server.engine.vllm_metrics import MetricText, vllm_metrics
from shared.errors import EngineDeadError, EngineError
from shared.schemas.engines import EngineStatus
from shared.schemas.rollouts import WeightVersionSpan
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import (
    EngineState,
    FinishReason,
    PauseMode,
)
from tests.fakes.engine_reports import fake_speculation, fake_status

VOCAB_SIZE = 256
NUM_TOKENS = 6
"""Tokens of a completion that is not cut short by ``max_tokens``."""


def fake_tokens(prompt_token_ids: list[int], sample_index: int, max_tokens: int) -> list[int]:
    """Lower-case letters that depend on the prompt and the sample only."""
    start = sum(prompt_token_ids) + 7 * sample_index
    return [97 + (start + 3 * i) % 26 for i in range(min(NUM_TOKENS, max_tokens))]


@dataclass(eq=False)
class FakeEngine:
    """Implements ``EngineHandle``. Clear ``unblocked`` and generation hangs until it is set."""

    engine_id: str
    state: EngineState = EngineState.SERVING
    node_id: str = "node-0"
    committed_version: int = 0
    error: str | None = None
    delay_s: float = 0.0
    fail_with: EngineError | None = None
    """Raised by the next calls of generate, status and speculation."""
    dies_on_generate: bool = False
    """Dies with the next group it is given."""
    dies_after_deltas: int | None = None
    """Dies in the middle of a stream, after this many deltas."""
    unblocked: asyncio.Event = field(default_factory=asyncio.Event)
    metrics_unblocked: asyncio.Event = field(default_factory=asyncio.Event)
    """Clear it, and the engine never answers for its metrics until it is set."""
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    """Set it, and whoever watches it finds it frozen."""
    num_metrics_asked: int = 0
    vllm_registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: list[GenerateRequest] = field(default_factory=list)
    patches: list[SpeculationPatch] = field(default_factory=list)
    pauses: list[PauseMode | None] = field(default_factory=list)
    """Operators' pauses and resumes (None) in order."""
    aborted: list[str] = field(default_factory=list)
    num_partial_tokens: int = 0
    """What a running sample has when asked for its progress."""
    num_progress_asked: int = 0
    num_finished: int = 0
    """Samples of a running group that are whole when asked."""
    num_running: int = 0
    max_running: int = 0
    """Most samples held at once."""

    def __post_init__(self) -> None:
        self.unblocked.set()
        self.metrics_unblocked.set()
        self._abort_events: dict[str, asyncio.Event] = {}

    def die(self, reason: str = "it was made to die") -> None:
        """Every present and later call raises ``EngineDeadError``."""
        self.state = EngineState.DEAD
        self.error = self.error or reason
        for event in self._abort_events.values():
            event.set()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        was_aborted = await self._work(request)
        samples = [self._sample(request, index, was_aborted) for index in range(request.n)]
        return GenerateResult(
            engine_id=self.engine_id,
            samples=samples,
            generate_s=0.01,
            timings=GenerateTimings(first_token_s=0.004, decode_s=0.005, num_tokens=NUM_TOKENS),
        )

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        await self._work(request)
        num_deltas = 0
        for index in range(request.n):
            sample = self._sample(request, index, was_aborted=False)
            last = len(sample.token_ids) - 1
            for position, token_id in enumerate(sample.token_ids):
                if num_deltas == self.dies_after_deltas:
                    self.die()
                self._raise_if_failing()
                yield GenerateDelta(
                    engine_id=self.engine_id,
                    sample_index=index,
                    token_ids=[token_id],
                    logprobs=[sample.logprobs[position]],
                    text=chr(token_id),
                    finish_reason=sample.finish_reason if position == last else None,
                    weight_versions=sample.weight_versions if position == last else None,
                )
                num_deltas += 1
                await asyncio.sleep(self.delay_s)

    async def progress(self, known: Mapping[str, KnownTokens]) -> dict[str, list[SampleProgress]]:
        self._raise_if_failing()
        self.num_progress_asked += 1
        running = {request.request_id: request for request in self.requests}
        return {
            request_id: self._news(running[request_id], tokens)
            for request_id, tokens in known.items()
            if request_id in self._abort_events
        }

    def _news(self, request: GenerateRequest, known: KnownTokens) -> list[SampleProgress]:
        news = []
        for index in range(request.n):
            sample = self._sample(request, index, was_aborted=False)
            if index < self.num_finished:
                if index not in known.finished:
                    news.append(SampleProgress(sample_index=index, whole=sample))
                continue
            start = known.num_tokens.get(index, 0)
            token_ids = sample.token_ids[start : self.num_partial_tokens]
            if token_ids:
                end = start + len(token_ids)
                span = WeightVersionSpan(version=self.committed_version, start=0, end=end)
                news.append(
                    SampleProgress(
                        sample_index=index,
                        start=start,
                        token_ids=token_ids,
                        logprobs=sample.logprobs[start:end],
                        weight_versions=[span],
                    )
                )
        return news

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self._abort_events:
            self._abort_events[request_id].set()

    async def status(self) -> EngineStatus:
        self._raise_if_failing()
        return fake_status(
            self.engine_id, self.node_id, self.state, self.committed_version, self.num_running
        )

    async def until_standstill(self) -> str:
        await self.frozen.wait()
        return "it was frozen"

    async def speculation(self, since_step: int) -> EngineSpeculation:
        self._raise_if_failing()
        return fake_speculation(self.engine_id, since_step)

    async def set_speculation(self, patch: SpeculationPatch) -> None:
        self._raise_if_failing()
        self.patches.append(patch)

    async def vllm_metrics(self) -> tuple[MetricText, ...]:
        self._raise_if_failing()
        self.num_metrics_asked += 1
        await self.metrics_unblocked.wait()
        return vllm_metrics(self.engine_id, self.vllm_registry)

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        return 0.0

    async def stage_initial(self) -> float:
        return 0.0

    @property
    def drafter(self) -> CurrentDrafter:
        return CurrentDrafter(version=self.committed_version, requantize_s=0.0)

    async def load_weights(self, version: int) -> None:
        self.committed_version = version

    async def resume(self) -> EngineCommitTimings:
        return EngineCommitTimings(
            engine_id=self.engine_id,
            stage_s=0.0,
            pause_s=0.0,
            load_s=0.0,
            requantize_s=0.0,
            resume_s=0.0,
            paused_s=0.0,
        )

    async def pause_generation(self, mode: PauseMode) -> None:
        self._raise_if_failing()
        self.pauses.append(mode)
        if self.state is EngineState.SERVING:
            self.state = EngineState.PAUSED
        self.unblocked.clear()
        if mode is PauseMode.ABORT:
            for event in self._abort_events.values():
                event.set()

    async def resume_generation(self) -> None:
        self._raise_if_failing()
        self.pauses.append(None)
        if self.state is EngineState.PAUSED:
            self.state = EngineState.SERVING
        self.unblocked.set()

    async def audit(self, path: str) -> EngineAudit:
        return EngineAudit(
            engine_id=self.engine_id,
            version=self.committed_version,
            num_equal=1,
            num_skipped=0,
            different=[],
            audit_s=0.0,
        )

    def condemn(self, reason: str) -> None:
        self.die(reason)

    async def discard(self, version: int) -> None:
        return None

    async def _work(self, request: GenerateRequest) -> bool:
        """Takes as long as the knobs say. True when the request was aborted meanwhile."""
        self.requests.append(request)
        aborted = self._abort_events.setdefault(request.request_id, asyncio.Event())
        self.num_running += request.n
        self.max_running = max(self.max_running, self.num_running)
        try:
            if self.dies_on_generate:
                self.die()
            self._raise_if_failing()
            waits = [asyncio.create_task(event.wait()) for event in (aborted, self.unblocked)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            await asyncio.sleep(self.delay_s)
            self._raise_if_failing()
            return aborted.is_set()
        finally:
            self.num_running -= request.n
            del self._abort_events[request.request_id]

    def _raise_if_failing(self) -> None:
        if self.state is EngineState.DEAD:
            raise EngineDeadError(f"engine {self.engine_id} is dead")
        if self.fail_with is not None:
            raise self.fail_with

    def _sample(self, request: GenerateRequest, index: int, was_aborted: bool) -> GeneratedSample:
        max_tokens = request.sampling.max_tokens
        token_ids = fake_tokens(request.prompt_token_ids, index, max_tokens)
        if was_aborted:
            token_ids = token_ids[: len(token_ids) // 2]
            reason = FinishReason.ABORT
        else:
            reason = FinishReason.LENGTH if len(token_ids) == max_tokens else FinishReason.STOP
        return GeneratedSample(
            sample_index=index,
            token_ids=token_ids,
            logprobs=[-0.5] * len(token_ids),
            text="".join(chr(token_id) for token_id in token_ids),
            finish_reason=reason,
            weight_versions=[
                WeightVersionSpan(version=self.committed_version, start=0, end=len(token_ids))
            ],
            num_draft_tokens=4,
            num_accepted_tokens=3,
            token_origins="aaarpppppppp"[: len(token_ids)].ljust(len(token_ids), "p"),
        )
