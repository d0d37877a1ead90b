"""``POST /v1/rollouts``: prompts in, scored groups of samples out."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.schemas.base import Checked, ErrorBody, JsonObject, WireModel
from shared.types import FinishReason, RewardStatus, RolloutRunState

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
"""Engines keep tokens and counts in 32 bits, and fail on what has more."""
LogitBias = dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]]
"""Added to the logits of these tokens before anything else is done to them."""


SessionId = Annotated[str, Field(min_length=1, max_length=128)]
"""Names a conversation whose turns come as separate requests: they go to one engine, which has the
turns before in its prefix cache, unless it is much busier than the others."""


class ChatMessage(WireModel):
    """One turn of a conversation; rendered with the model's own chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class PromptItem(WireModel):
    """One prompt, given in exactly one of three forms, and what the reward needs to judge it."""

    prompt: str | None = Field(default=None, min_length=1)
    prompt_token_ids: Checked[TokenId] | None = Field(default=None, min_length=1)
    messages: Checked[ChatMessage] | None = Field(default=None, min_length=1)
    answer: str | None = None
    """Reference answer, handed to the reward function."""
    metadata: JsonObject = Field(default_factory=dict)
    """Echoed back and handed to the reward function."""
    session_id: SessionId | None = None

    @model_validator(mode="after")
    def exactly_one_form(self) -> Self:
        given = [
            name
            for name in ("prompt", "prompt_token_ids", "messages")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of prompt, prompt_token_ids, messages; "
                f"got {', '.join(given) if given else 'none'}"
            )
        return self


class SamplingOptions(WireModel):
    """Sampling settings, with vLLM's meanings. The same settings drive target and drafter."""

    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """0 keeps every token."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drops tokens less likely than this share of the likeliest one; 0 keeps every token."""
    max_tokens: int = Field(default=256, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    stop: Checked[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    stop_token_ids: Checked[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: LogitBias = Field(default_factory=dict)

    @model_validator(mode="after")
    def min_below_max(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class RewardSpec(WireModel):
    """Which registered reward judges the samples, and its parameters."""

    name: str = Field(min_length=1)
    params: JsonObject = Field(default_factory=dict)


class RolloutRequest(WireModel):
    """Body of ``POST /v1/rollouts``."""

    request_id: str | None = Field(
        default=None, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:=/-]+$"
    )
    """Idempotency key; the server makes one up when it is absent."""
    prompts: Checked[PromptItem] = Field(min_length=1)
    n: int = Field(default=1, ge=1)
    """Samples per prompt (the group size of GRPO)."""
    over_provision: int = Field(default=0, ge=0)
    """Samples per prompt that are begun beyond ``n``: the ``n`` that finish first are the group,
    the others are ended. Spares the wait for stragglers, and prefers short completions: a bias."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds after which whatever is unfinished ends with ``finish_reason: abort``."""
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    reward: RewardSpec | None = None
    max_policy_lag: int | None = Field(default=None, ge=0)
    """Samples whose oldest token is more than this many versions behind are marked ``stale``."""
    stream: bool = False
    """True: NDJSON, one ``StreamLine`` per finished group, in order of finishing."""


class WeightVersionSpan(WireModel):
    """Half-open span ``[start, end)`` of completion tokens sampled under one weight version."""

    version: int
    start: int
    end: int


class SampleTimings(WireModel):
    """Seconds, measured on the server."""

    queue_s: float
    """From acceptance to hand-over to an engine."""
    generate_s: float
    score_s: float


class RolloutSample(WireModel):
    """One completion with everything a trainer needs; it never has to tokenize text again."""

    sample_index: int
    token_ids: list[int]  # [num_completion_tokens]
    logprobs: list[float]  # [num_completion_tokens]
    """Behaviour logprobs: of exactly these tokens, after temperature, top-p and top-k."""
    text: str
    finish_reason: FinishReason
    reward: float | None
    reward_status: RewardStatus
    reward_detail: JsonObject = Field(default_factory=dict)
    weight_versions: list[WeightVersionSpan]
    policy_lag: int
    """Committed version at delivery minus the version of the oldest token."""
    stale: bool = False
    """True when ``policy_lag`` is above the request's ``max_policy_lag``."""
    engine_id: str
    num_draft_tokens: int
    num_accepted_tokens: int
    token_origins: str = ""  # [num_completion_tokens]
    """How each token came about, a letter each: ``p`` plain (sampled without drafts), ``a``
    accepted draft, ``r`` recovered (sampled where a draft was rejected), ``b`` bonus (sampled
    behind drafts that were all accepted), ``?`` sampled by an engine that died since. Empty where
    nobody knows."""
    timings: SampleTimings


class RolloutGroup(WireModel):
    """The samples of one prompt."""

    group_id: str
    prompt_index: int
    prompt_token_ids: list[int]  # [num_prompt_tokens]
    answer: str | None
    metadata: JsonObject
    samples: list[RolloutSample]  # [n]


class RolloutUsage(WireModel):
    """Token counts of a request."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int


class RolloutResponse(WireModel):
    """Answer of ``POST /v1/rollouts`` without streaming; groups in the order of the prompts."""

    request_id: str
    groups: list[RolloutGroup]
    usage: RolloutUsage


class StreamLine(WireModel):
    """One NDJSON line: a finished group, then exactly one of ``done`` and ``error``."""

    type: Literal["group", "done", "error"]
    request_id: str
    group: RolloutGroup | None = None
    usage: RolloutUsage | None = None
    error: ErrorBody | None = None


class RolloutStatusResponse(WireModel):
    """Answer of ``GET`` and ``DELETE /v1/rollouts/{request_id}``."""

    request_id: str
    state: RolloutRunState
    num_groups: int
    num_finished_groups: int
    result: RolloutResponse | None = None
    """Present when ``state`` is ``finished``."""
    error: ErrorBody | None = None
    """Present when ``state`` is ``failed``."""
