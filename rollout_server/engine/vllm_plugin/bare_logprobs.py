"""vLLM's front end decodes every token a second time, by itself, for the logprobs' sake.

That is the text that goes with each logprob, and nobody here reads it: a sample has its token ids
and the text of the whole. It took a fifth of what an engine's front end does for a token, and one
process does it for all sequences of an engine. Leans on vLLM 0.32.0:
``LogprobsProcessor.from_new_request``, which decodes nothing where there is no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def without_token_texts(from_new_request: Callable[..., Any]) -> Any:
    """``LogprobsProcessor.from_new_request``, a class method, without the tokenizer."""

    def from_new_request_without_texts(_cls: type, tokenizer: Any, request: Any) -> Any:
        return from_new_request(None, request)

    return classmethod(from_new_request_without_texts)
