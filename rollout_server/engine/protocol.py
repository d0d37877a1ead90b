"""What the rest of the server may ask of an engine, and the records that travel.

``router/``, ``api/`` and ``weights/`` know engines only through ``EngineHandle``;
``engine/handle.py`` implements it over Ray, ``tests/fakes/engine.py`` in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rollout_server.engine.drafter_state import DrafterState
from rollout_server.engine.vllm_metrics import MetricText
from shared.schemas.engines import EnginePoolStatus, EngineStatus
from shared.schemas.rollouts import SamplingOptions, WeightVersionSpan
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import EngineState, FinishReason, PauseMode


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One prompt, ``n`` samples. ``request_id`` is unique among live requests of the server."""

    request_id: str
    prompt_token_ids: list[int]  # [num_prompt_tokens]
    n: int
    sampling: SamplingOptions
    session_id: str | None = None
    """Conversation it is a turn of; routing only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedSample:
    """One finished completion."""

    sample_index: int
    token_ids: list[int]  # [num_completion_tokens]
    logprobs: list[float]  # [num_completion_tokens]
    text: str
    finish_reason: FinishReason
    weight_versions: list[WeightVersionSpan]
    num_draft_tokens: int
    num_accepted_tokens: int
    token_origins: str = ""  # [num_completion_tokens]
    """A letter each (``TokenOrigin``); none where nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateTimings:
    """Where the seconds of a group went inside the engine, by its sample that finished last."""

    first_token_s: float
    """From its arrival in the engine, waiting there included."""
    decode_s: float
    """From the first token to the last."""
    num_tokens: int
    """Tokens of that sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """The samples of one prompt, in order of ``sample_index``."""

    engine_id: str
    samples: list[GeneratedSample]  # [n]
    generate_s: float
    timings: GenerateTimings | None = None
    """None when no token was sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateDelta:
    """What a streamed sample gained since the last delta; the last one has a ``finish_reason``."""

    engine_id: str
    sample_index: int
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason | None
    weight_versions: list[WeightVersionSpan] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownTokens:
    """What the asker of ``progress`` has of one request."""

    num_tokens: Mapping[int, int]
    """By sample index; absent samples have none."""
    finished: frozenset[int]
    """Samples it has whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleProgress:
    """What an unfinished request has of one sample: new tokens, or all of it when it is done."""

    sample_index: int
    start: int = 0
    """Place of the first of ``token_ids`` in the sample."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[WeightVersionSpan] = field(default_factory=list)
    """Of all its tokens so far."""
    whole: GeneratedSample | None = None


class EngineHandle(Protocol):
    """One engine, wherever it runs. Every call has a timeout and raises ``EngineError`` or
    ``EngineDeadError``; nothing else escapes."""

    @property
    def engine_id(self) -> str: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def node_id(self) -> str:
        """Ray's name of the machine it runs on; empty until it has started."""
        ...

    @property
    def error(self) -> str | None:
        """Why it is dead, if it is."""
        ...

    @property
    def committed_version(self) -> int:
        """Target version as of the last commit this handle saw."""
        ...

    @property
    def drafter(self) -> DrafterState: ...

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    def generate_stream(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]: ...

    async def progress(self, known: Mapping[str, KnownTokens]) -> dict[str, list[SampleProgress]]:
        """What running requests have that the caller does not, by request id."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its ``generate`` returns what there is with ``finish_reason: abort``."""
        ...

    async def status(self) -> EngineStatus: ...

    async def until_standstill(self) -> str:
        """While it owes an answer: watch until it is frozen; the reason to give it up.

        Raises:
            EngineDeadError: it was given up otherwise.
        """
        ...

    async def speculation(self, since_step: int) -> EngineSpeculation: ...

    async def set_speculation(self, patch: SpeculationPatch) -> None: ...

    async def vllm_metrics(self) -> tuple[MetricText, ...]:
        """vLLM's own Prometheus metrics, labelled with the engine's id."""
        ...

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        """Map and check a verified file against the model. Seconds.

        Raises:
            WeightVerificationError: names, shapes or dtypes do not fit the model.
        """
        ...

    async def stage_initial(self) -> float:
        """Stage, as version 0, the weights of the model directory the engine started from.

        Raises:
            EngineError: they are not there as safetensors files.
        """
        ...

    async def load_weights(self, version: int) -> None:
        """Pause, load the target, set its version. Stays paused (SYNCING) until ``resume``; may be
        asked again meanwhile, for another staged version.

        Raises:
            WeightCommitError: the engine is poisoned; its state is DEAD.
        """
        ...

    async def resume(self) -> EngineCommitTimings:
        """End of a push: generate again. Seconds of every part since the pause. The drafter's
        rebuild may follow (``drafter``); one that fails ends the engine.

        Raises:
            WeightCommitError: the engine is poisoned; its state is DEAD.
        """
        ...

    async def pause_generation(self, mode: PauseMode) -> None:
        """An operator's pause: stop generating until ``resume_generation``, pushes or not. Requests
        are still taken. Waits for the end of a push; repeatable, also with another mode.

        Raises:
            EngineError: what ran has not ended in time (mode ``wait``); the pause stands.
        """
        ...

    async def resume_generation(self) -> None:
        """End an operator's pause; nothing happens where there is none."""
        ...

    async def audit(self, path: str) -> EngineAudit:
        """Compare live weights and drafter with a file (or model directory) of their version."""
        ...

    def condemn(self, reason: str) -> None:
        """Never use it again: its state is DEAD from now on, and the pool replaces it."""
        ...

    async def discard(self, version: int) -> None:
        """Forget a staged version."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Facts of the served model that requests are checked against."""

    model_id: str
    vocab_size: int
    max_model_len: int


class EnginePool(Protocol):
    """All engines of the server. Implemented over Ray in ``engine/pool.py``."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def target_count(self) -> int:
        """Engines asked for by configuration or the last ``scale``."""
        ...

    @property
    def max_num_speculative_tokens(self) -> int:
        """Draft length the engines reserved KV slots for; 0 without a drafter."""
        ...

    def engines(self) -> Sequence[EngineHandle]:
        """Every engine that is not gone, in order of creation, STARTING and DRAINING included."""
        ...

    def pools(self) -> Sequence[EnginePoolStatus]:
        """Every pool with its target and its losses; at least one."""
        ...

    async def scale(self, count: int, pool: str | None = None) -> None:
        """An operator sets the target count of a pool; its quarantine ends. Returns at once: new
        engines start, surplus ones drain, in the background.

        Args:
            pool: may be left out where there is one.

        Raises:
            InvalidRequestError: no such pool, or above its ``max_count``.
        """
        ...

    def drain(self, engine_id: str, *, replace: bool) -> None:
        """Let an engine finish what it has, then stop it. Returns at once; safe to repeat.

        Args:
            replace: start another in its place now; False lowers the target count instead.

        Raises:
            UnknownResourceError: there is no such engine.
            ConflictError: it is starting, or in the middle of a push.
        """
        ...

    def remove(self, engine_id: str, *, replace: bool) -> None:
        """Stop an engine now, whatever it is doing: its groups are generated again elsewhere.

        Raises:
            UnknownResourceError: there is no such engine.
        """
        ...

    def adjust(self, count: int, pool: str) -> None:
        """As ``scale``, for the autoscaling policy: a quarantine goes on."""
        ...
