"""Chat completions are completions of a rendered conversation: to one, and back. Pure."""

from __future__ import annotations

from typing import Literal

from rollout_server.collaborators import Tokenizer
from rollout_server.completions.job import CompletionJob, check_model, prepare_job
from rollout_server.engine.protocol import ModelInfo
from rollout_server.rollouts.prompts import check_prompt_tokens
from shared.errors import InvalidRequestError
from shared.schemas.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ChatMessageOut,
    ChatTokenLogprob,
    ChatTurn,
)
from shared.schemas.completions import CompletionLogprobs, CompletionRequest, CompletionResponse
from shared.schemas.rollouts import ChatMessage

REPLACEMENT_CHARACTER = "\ufffd"
"""What a part of a character decodes to."""


def prepare_chat_job(
    request: ChatCompletionRequest,
    *,
    completion_id: str,
    created: int,
    tokenizer: Tokenizer,
    model: ModelInfo,
    max_tokens_limit: int,
) -> CompletionJob:
    """Render the conversation with the model's own template. Slow: run it in a thread.

    Args:
        max_tokens_limit: what a request that names no length may have at most.

    Raises:
        InvalidRequestError: no template, a conversation it refuses, or one that is too long.
        ModelNotFoundError: another model was asked for.
    """
    check_model(request.model, model)
    token_ids = tokenizer.encode_chat([_message(turn) for turn in request.messages])
    max_tokens = wanted_max_tokens(request)
    check_prompt_tokens(token_ids, model, max_tokens or 1, "messages")
    completion = CompletionRequest(
        model=request.model,
        prompt=token_ids,
        n=request.n,
        max_tokens=max_tokens or min(max_tokens_limit, model.max_model_len - len(token_ids)),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        stop=request.stop,
        seed=request.seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        logprobs=0 if request.logprobs else None,
        session_id=request.session_id,
        stream=request.stream,
        stream_options=request.stream_options,
        return_token_ids=request.return_token_ids,
        ignore_eos=request.ignore_eos,
    )
    return prepare_job(
        completion, completion_id=completion_id, created=created, tokenizer=tokenizer, model=model
    )


def wanted_max_tokens(request: ChatCompletionRequest) -> int | None:
    """The one length that was asked for, under either name.

    Raises:
        InvalidRequestError: two different ones.
    """
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequestError(
            f"max_completion_tokens {new} and max_tokens {old} contradict each other",
            param="max_tokens",
        )
    return old if new is None else new


def chat_response(completion: CompletionResponse) -> ChatCompletionResponse:
    """The whole answer."""
    assert completion.usage is not None, "only chunks come without"
    return ChatCompletionResponse(
        id=completion.id,
        created=completion.created,
        model=completion.model,
        choices=[
            ChatChoice(
                index=choice.index,
                message=ChatMessageOut(content=choice.text),
                finish_reason=choice.finish_reason,
                logprobs=_logprobs(choice.logprobs),
                token_ids=choice.token_ids,
                weight_versions=choice.weight_versions,
            )
            for choice in completion.choices
        ],
        usage=completion.usage,
        prompt_token_ids=completion.choices[0].prompt_token_ids,
    )


class ChatChunks:
    """Chunks of a completion as chunks of a chat; remembers what comes once."""

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def chunk(self, completion: CompletionResponse) -> ChatCompletionChunk:
        """The next one."""
        is_first = not self._begun
        choices = []
        for choice in completion.choices:
            role: Literal["assistant"] | None = None
            if choice.index not in self._begun:
                role = "assistant"
            self._begun.add(choice.index)
            choices.append(
                ChatChunkChoice(
                    index=choice.index,
                    delta=ChatDelta(role=role, content=choice.text),
                    finish_reason=choice.finish_reason,
                    logprobs=_logprobs(choice.logprobs),
                    token_ids=choice.token_ids,
                    weight_versions=choice.weight_versions,
                )
            )
        prompt_token_ids = None
        if is_first and completion.choices:
            prompt_token_ids = completion.choices[0].prompt_token_ids
        return ChatCompletionChunk(
            id=completion.id,
            created=completion.created,
            model=completion.model,
            choices=choices,
            usage=completion.usage,
            prompt_token_ids=prompt_token_ids,
        )


def _message(turn: ChatTurn) -> ChatMessage:
    if isinstance(turn.content, str):
        return ChatMessage(role=turn.role, content=turn.content)
    return ChatMessage(role=turn.role, content="".join(part.text for part in turn.content))


def _logprobs(logprobs: CompletionLogprobs | None) -> ChatLogprobs | None:
    if logprobs is None:
        return None
    pairs = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(token=token, logprob=logprob, bytes=_utf8(token))
            for token, logprob in pairs
        ]
    )


def _utf8(token: str) -> list[int] | None:
    return None if REPLACEMENT_CHARACTER in token else list(token.encode())
