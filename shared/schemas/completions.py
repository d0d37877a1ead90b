"""OpenAI-compatible ``/v1/completions`` and ``/v1/models``: the subset that is honoured.

Fields OpenAI knows and this service does not are refused with a 400 that names them, instead of
being ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.schemas.base import Checked, WireModel
from shared.schemas.rollouts import LogitBias, SessionId, TokenId, WeightVersionSpan

TokenIds = Annotated[Checked[TokenId], Field(min_length=1)]


class StreamOptions(WireModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class CompletionRequest(WireModel):
    """Body of ``POST /v1/completions``."""

    model: str
    prompt: str | Checked[str] | Checked[TokenId] | Checked[TokenIds]
    n: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    stop: str | Checked[str] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    logit_bias: LogitBias = Field(default_factory=dict)
    logprobs: int | None = Field(default=None, ge=0, le=0)
    """0 returns the sampled tokens' logprobs; alternatives are not offered."""
    echo: Literal[False] = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    user: str | None = None
    session_id: SessionId | None = None
    """Not OpenAI's (``extra_body``): turns of one conversation share an engine's prefix cache."""


class CompletionLogprobs(WireModel):
    """OpenAI's logprobs block, for the sampled tokens only."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: list[int]


class CompletionChoice(WireModel):
    """One completion."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    weight_versions: list[WeightVersionSpan] | None = None


class CompletionUsage(WireModel):
    """OpenAI's usage block."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(WireModel):
    """Answer of ``POST /v1/completions`` (and, with deltas, each SSE chunk)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class ModelCard(WireModel):
    """One entry of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "slipstream"
    max_model_len: int


class ModelList(WireModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
