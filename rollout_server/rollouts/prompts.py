"""Turns the prompts of a request into token ids and checks them against the model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.collaborators import Tokenizer
from rollout_server.engine.protocol import ModelInfo
from shared.errors import InvalidRequestError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import PromptItem


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedPrompt:
    """One prompt as engines and rewards want it."""

    prompt_index: int
    text: str
    token_ids: list[int]  # [num_prompt_tokens]
    answer: str | None
    metadata: JsonObject
    session_id: str | None = None


def prepare_prompts(
    items: Sequence[PromptItem], tokenizer: Tokenizer, model: ModelInfo, max_tokens: int
) -> list[PreparedPrompt]:
    """Tokenize and check every prompt. Slow for large requests: run it in a thread.

    Raises:
        InvalidRequestError: a prompt is empty, too long, or has ids outside the vocabulary.
    """
    return [_prepare(index, item, tokenizer, model, max_tokens) for index, item in enumerate(items)]


def check_prompt_tokens(
    token_ids: Sequence[int], model: ModelInfo, max_tokens: int, param: str
) -> None:
    """Check one tokenized prompt.

    Raises:
        InvalidRequestError: naming the value and the limit.
    """
    if not token_ids:
        raise InvalidRequestError(f"{param} is empty: it has no tokens", param=param)
    if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        position = next(
            position
            for position, token_id in enumerate(token_ids)
            if not 0 <= token_id < model.vocab_size
        )
        raise InvalidRequestError(
            f"{param}[{position}] is {token_ids[position]}, outside the vocabulary of "
            f"{model.vocab_size} tokens",
            param=f"{param}.{position}",
        )
    if len(token_ids) + max_tokens > model.max_model_len:
        raise InvalidRequestError(
            f"{param} has {len(token_ids)} tokens and max_tokens is {max_tokens}: together above "
            f"model.max_model_len {model.max_model_len}",
            param=param,
        )


def _prepare(
    index: int, item: PromptItem, tokenizer: Tokenizer, model: ModelInfo, max_tokens: int
) -> PreparedPrompt:
    if item.prompt_token_ids is not None:
        token_ids = item.prompt_token_ids
        param = f"prompts.{index}.prompt_token_ids"
        check_prompt_tokens(token_ids, model, max_tokens, param)
        text = tokenizer.decode(token_ids)
    elif item.messages is not None:
        param = f"prompts.{index}.messages"
        try:
            token_ids = tokenizer.encode_chat(item.messages)
        except InvalidRequestError as exc:
            raise InvalidRequestError(exc.message, param=param) from exc
        check_prompt_tokens(token_ids, model, max_tokens, param)
        text = tokenizer.decode(token_ids)
    else:
        assert item.prompt is not None, "PromptItem has exactly one form"
        text = item.prompt
        token_ids = tokenizer.encode(text)
        check_prompt_tokens(token_ids, model, max_tokens, f"prompts.{index}.prompt")
    return PreparedPrompt(
        prompt_index=index,
        text=text,
        token_ids=token_ids,
        answer=item.answer,
        metadata=item.metadata,
        session_id=item.session_id,
    )
