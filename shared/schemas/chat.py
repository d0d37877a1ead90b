"""OpenAI-compatible ``/v1/chat/completions``: the subset that is honoured.

A conversation is rendered with the chat template of the model's own tokenizer. A request cannot
bring a template, tools or media: such fields are refused by name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.schemas.base import Checked, WireModel
from shared.schemas.completions import CompletionUsage, StreamOptions
from shared.schemas.rollouts import LogitBias, SessionId, WeightVersionSpan


class ChatTextPart(WireModel):
    """A piece of a message; pieces are joined as they are."""

    type: Literal["text"]
    text: str


class ChatTurn(WireModel):
    """One message of the conversation so far."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | Checked[ChatTextPart]


class ChatCompletionRequest(WireModel):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: Checked[ChatTurn] = Field(min_length=1)
    n: int = Field(default=1, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """What the model's context and ``server.limits.max_tokens`` leave when absent."""
    max_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's older name of ``max_completion_tokens``."""
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
    logprobs: bool = False
    """Of the sampled tokens."""
    top_logprobs: int | None = Field(default=None, ge=0, le=0)
    """Alternatives are not offered."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    user: str | None = None
    session_id: SessionId | None = None
    """Not OpenAI's (``extra_body``): turns of one conversation share an engine's prefix cache."""


class ChatTokenLogprob(WireModel):
    """One sampled token."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 of ``token``; null for a token that is a part of a character."""
    top_logprobs: list[None] = Field(default_factory=list, max_length=0)


class ChatLogprobs(WireModel):
    """OpenAI's logprobs block."""

    content: list[ChatTokenLogprob]


class ChatMessageOut(WireModel):
    """What the model says; can be sent back as a message of the next request."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(WireModel):
    """One completion."""

    index: int
    message: ChatMessageOut
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None
    weight_versions: list[WeightVersionSpan] | None = None


class ChatCompletionResponse(WireModel):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_token_ids: list[int] | None = None
    """The rendered conversation, with ``return_token_ids``."""


class ChatDelta(WireModel):
    """What a chunk adds; the role comes once."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChunkChoice(WireModel):
    """A chunk's share of one completion."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None
    weight_versions: list[WeightVersionSpan] | None = None


class ChatCompletionChunk(WireModel):
    """One server-sent event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    prompt_token_ids: list[int] | None = None
    """In the first chunk, with ``return_token_ids``."""
