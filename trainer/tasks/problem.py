"""The record a task hands to the loop, what every task can do, and how problems are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from shared.schemas.base import JsonObject
from shared.schemas.rollouts import ChatMessage, PromptItem

_HASH_RANGE = 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One prompt (exactly one of ``prompt`` and ``messages``) and its reference answer."""

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    answer: str
    metadata: JsonObject = field(default_factory=dict)

    def to_prompt_item(self) -> PromptItem:
        """The wire form. Raises ``ValueError`` unless exactly one form of prompt is given."""
        messages = None if self.messages is None else list(self.messages)
        return PromptItem(
            prompt=self.prompt, messages=messages, answer=self.answer, metadata=self.metadata
        )

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it (for logs)."""
        if self.messages is not None:
            return "\n".join(f"{message.role}: {message.content}" for message in self.messages)
        return self.prompt or ""


class Task(Protocol):
    """A source of problems. Both methods are functions of the configuration and their arguments
    alone, so that a resumed run sees exactly the prompts the interrupted one would have seen."""

    def train_batch(self, step: int, count: int) -> Sequence[Problem]:
        """``count`` problems for training step ``step`` (from 0)."""
        ...

    def held_out(self, count: int) -> Sequence[Problem]:
        """At most ``count`` problems that no ``train_batch`` ever returns."""
        ...


def is_held_out(canonical: str, held_out_fraction: float) -> bool:
    """Whether a problem belongs to the held-out side.

    Depends on the problem's text alone, not on any seed: whoever draws problems, in whatever order,
    the two sides never meet. A smaller fraction selects a subset of a larger one.
    """
    return xxhash.xxh3_64_intdigest(canonical.encode()) < held_out_fraction * _HASH_RANGE
