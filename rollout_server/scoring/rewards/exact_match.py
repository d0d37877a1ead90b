"""Reward for a completion that is the reference answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_match(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    strip: bool = True,
    ignore_case: bool = False,
) -> float:
    """1 when completion and answer are the same text, else 0.

    Args:
        strip: white space around either does not count.
        ignore_case: upper and lower case do not count.

    Raises:
        ValueError: the prompt came without an answer.
    """
    if answer is None:
        raise ValueError("exact_match needs the prompt's answer, which is absent")
    return float(
        _normalize(completion, strip, ignore_case) == _normalize(answer, strip, ignore_case)
    )


def _normalize(text: str, strip: bool, ignore_case: bool) -> str:
    text = text.strip() if strip else text
    return text.casefold() if ignore_case else text
