"""The model's Hugging Face tokenizer behind the service's ``Tokenizer`` protocol."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from rollout_server.collaborators import Tokenizer
from shared.errors import InvalidRequestError
from shared.schemas.rollouts import ChatMessage


class HuggingFaceTokenizer(Tokenizer):
    """Wraps a ``PreTrainedTokenizerBase``; safe to call from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Fast tokenizers refuse to be borrowed by two threads at once when settings change.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False) -> HuggingFaceTokenizer:
        """Read the tokenizer that lies beside the model's weights."""
        from transformers import AutoTokenizer  # costs seconds; only servers pay

        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code))

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens the model expects around a prompt."""
        with self._lock:
            return [int(token_id) for token_id in self._tokenizer.encode(text)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the tokens."""
        with self._lock:
            return str(
                self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            )

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Render with the model's chat template and tokenize.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses these messages.
        """
        turns = [message.model_dump(mode="json") for message in messages]
        with self._lock:
            if not self._tokenizer.chat_template:
                raise InvalidRequestError(
                    "messages need a chat template and this model's tokenizer has none; "
                    "send prompt or prompt_token_ids",
                    param="messages",
                )
            try:
                token_ids = self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except TemplateError as exc:
                raise InvalidRequestError(
                    f"the model's chat template refuses these messages: {exc}", param="messages"
                ) from exc
        return [int(token_id) for token_id in token_ids]


def completion_text(tokenizer: Tokenizer, prompt_ids: list[int], token_ids: list[int]) -> str:
    """Text of a completion as vLLM writes it: in its context, without special tokens.

    Some tokenizers drop the space before a first word, so that a completion has to be read after
    its prompt.
    """
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *token_ids], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    # The prompt ends inside a character that the completion finishes.
    return tokenizer.decode(token_ids, skip_special_tokens=True)
