"""An engine without a model: it takes as long as a formula says and answers with made-up tokens.

For questions about the server and not about decoding. With ``step_s`` 0 it answers at once;
otherwise it runs a batch as vLLM does: sequences wait for one of ``max_num_seqs`` places, and
every step gives each running one a token.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from time import monotonic

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
from rollout_server.engine.vllm_metrics import MetricText
from shared.errors import EngineDeadError
from shared.schemas.engines import EngineStatus
from shared.schemas.rollouts import WeightVersionSpan
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import DrafterScheme, EngineState, FinishReason, PauseMode, SpeculationReason

VOCAB_SIZE = 256
MAX_MODEL_LEN = 8192
BLOCK_SIZE = 16
LETTERS = [97 + index % 26 for index in range(MAX_MODEL_LEN)]
TEXT = bytes(LETTERS).decode()
LOGPROBS = [-0.6931471805599453 - (index % 97) / 1000 for index in range(MAX_MODEL_LEN)]
"""As many digits as real ones: they have to be encoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTimes:
    """How long generation takes."""

    step_s: float = 0.0
    """Of a step with one sequence; 0: everything is there at once."""
    step_s_per_sequence: float = 0.0
    """What every further running sequence adds."""
    max_num_seqs: int = 64
    mean_tokens: float | None = None
    """Of a completion: lengths are geometric with this mean. None: every one has ``max_tokens``."""


def completion_length(request: GenerateRequest, sample_index: int, times: EngineTimes) -> int:
    """Depends on the prompt and the sample only, so that two runs have the same work."""
    max_tokens = request.sampling.max_tokens
    if times.mean_tokens is None:
        return max_tokens
    seed = zlib.crc32(bytes(token_id % 256 for token_id in request.prompt_token_ids))
    draw = random.Random(seed * 1_000_003 + sample_index).expovariate(1 / times.mean_tokens)
    return max(1, min(round(draw), max_tokens))


@dataclass(kw_only=True, slots=True, eq=False)
class _Sequence:
    num_wanted: int
    num_tokens: int = 0
    is_aborted: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ModelledEngine:
    """Implements ``engine.protocol.EngineHandle``."""

    node_id = ""

    def __init__(self, engine_id: str, times: EngineTimes) -> None:
        self.engine_id = engine_id
        self.state = EngineState.SERVING
        self.error: str | None = None
        self.committed_version = 0
        self._times = times
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._by_request: dict[str, list[_Sequence]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._num_generated = 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self._check_alive()
        started_s = monotonic()
        lengths = [completion_length(request, i, self._times) for i in range(request.n)]
        aborted = [False] * request.n
        if self._times.step_s > 0:
            sequences = await self._run(request.request_id, lengths)
            lengths = [sequence.num_tokens for sequence in sequences]
            aborted = [sequence.is_aborted for sequence in sequences]
        self._num_generated += sum(lengths)
        took_s = monotonic() - started_s
        return GenerateResult(
            engine_id=self.engine_id,
            samples=[
                self._sample(index, length, request.sampling.max_tokens, was_aborted)
                for index, (length, was_aborted) in enumerate(zip(lengths, aborted, strict=True))
            ],
            generate_s=took_s,
            timings=GenerateTimings(first_token_s=0.0, decode_s=took_s, num_tokens=max(lengths)),
        )

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        self._check_alive()
        lengths = [completion_length(request, i, self._times) for i in range(request.n)]
        if self._times.step_s > 0:
            sequences = await self._run(request.request_id, lengths)
            lengths = [sequence.num_tokens for sequence in sequences]
        for index, length in enumerate(lengths):
            sample = self._sample(index, length, request.sampling.max_tokens, False)
            yield GenerateDelta(
                engine_id=self.engine_id,
                sample_index=index,
                token_ids=sample.token_ids,
                logprobs=sample.logprobs,
                text=sample.text,
                finish_reason=sample.finish_reason,
                weight_versions=sample.weight_versions,
            )

    async def abort(self, request_id: str) -> None:
        for sequence in self._by_request.get(request_id, ()):
            if not sequence.ended.is_set():
                sequence.is_aborted = True
                sequence.ended.set()
        # Their places are free at once, for those that wait.
        self._running = [s for s in self._running if not s.ended.is_set()]
        self._waiting = deque(s for s in self._waiting if not s.ended.is_set())

    async def progress(self, known: Mapping[str, KnownTokens]) -> dict[str, list[SampleProgress]]:
        return {}

    async def pause_generation(self, mode: PauseMode) -> None:
        if self.state is EngineState.SERVING:
            self.state = EngineState.PAUSED

    async def resume_generation(self) -> None:
        if self.state is EngineState.PAUSED:
            self.state = EngineState.SERVING

    async def until_standstill(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError("it has no processes that could freeze")

    async def status(self) -> EngineStatus:
        capacity = self._times.max_num_seqs
        return EngineStatus(
            engine_id=self.engine_id,
            state=self.state,
            pid=None,
            cpu_cores=None,
            target_version=self.committed_version,
            drafter_version=self.committed_version,
            drafter_scheme=DrafterScheme.NONE,
            num_running_reqs=len(self._running),
            num_waiting_reqs=len(self._waiting),
            kv_cache_usage=len(self._running) / capacity,
            num_kv_blocks=capacity * MAX_MODEL_LEN // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            num_generation_tokens=self._num_generated,
            num_prompt_tokens=0,
            num_preemptions=0,
            num_reserved=0,
            start_up_s=0.0,
            uptime_s=0.0,
        )

    async def speculation(self, since_step: int) -> EngineSpeculation:
        return EngineSpeculation(
            engine_id=self.engine_id,
            enabled=False,
            num_speculative_tokens=0,
            reason=SpeculationReason.MODE_OFF,
            kv_cache_usage=0.0,
            num_steps=0,
            num_steps_on=0,
            num_switches=0,
            num_drafts=0,
            num_draft_tokens=0,
            num_accepted_tokens=0,
            num_accepted_tokens_per_pos=[],
            mean_acceptance_length=0.0,
            history=[],
        )

    async def set_speculation(self, patch: SpeculationPatch) -> None:
        self._check_alive()

    async def vllm_metrics(self) -> tuple[MetricText, ...]:
        return ()

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
        self.state = EngineState.DEAD
        self.error = reason

    async def discard(self, version: int) -> None:
        return None

    async def _run(self, request_id: str, lengths: list[int]) -> list[_Sequence]:
        sequences = [_Sequence(num_wanted=length) for length in lengths]
        self._by_request[request_id] = sequences
        self._waiting.extend(sequences)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_forever(), name=self.engine_id)
        try:
            for sequence in sequences:
                await sequence.ended.wait()  # bounded by the lengths
        finally:
            await self.abort(request_id)  # whoever waited may have been cancelled
            del self._by_request[request_id]
        return sequences

    async def _step_forever(self) -> None:
        """While there is work. Late steps are made up for: the pace is the formula's."""
        times = self._times
        due_s = monotonic()
        while self._running or self._waiting:
            while self._waiting and len(self._running) < times.max_num_seqs:
                self._running.append(self._waiting.popleft())
            due_s += times.step_s + times.step_s_per_sequence * (len(self._running) - 1)
            await asyncio.sleep(max(0.0, due_s - monotonic()))
            for sequence in self._running:
                sequence.num_tokens += 1
                if sequence.num_tokens >= sequence.num_wanted:
                    sequence.ended.set()
            self._running = [s for s in self._running if not s.ended.is_set()]

    def _check_alive(self) -> None:
        if self.state is EngineState.DEAD:
            raise EngineDeadError(f"engine {self.engine_id} is dead")

    def _sample(
        self, index: int, length: int, max_tokens: int, was_aborted: bool
    ) -> GeneratedSample:
        reason = FinishReason.LENGTH if length == max_tokens else FinishReason.STOP
        return GeneratedSample(
            sample_index=index,
            token_ids=LETTERS[:length],
            logprobs=LOGPROBS[:length],
            text=TEXT[:length],
            finish_reason=FinishReason.ABORT if was_aborted else reason,
            weight_versions=[WeightVersionSpan(version=self.committed_version, start=0, end=length)]
            if length
            else [],
            num_draft_tokens=0,
            num_accepted_tokens=0,
        )
