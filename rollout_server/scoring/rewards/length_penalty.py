"""Reward against completions that are too long: DAPO's soft overlong punishment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout_server.scoring.signature import RewardParamError

CHARACTERS = "characters"
WORDS = "words"
UNITS = (CHARACTERS, WORDS)


def length_penalty(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    max_length: int,
    buffer: int | None = None,
    unit: str = CHARACTERS,
    penalty: float = 1.0,
) -> tuple[float, dict[str, Any]]:
    """0 for what is short enough, ``-penalty`` from ``max_length`` on, a straight line in between.

    Lengths are those of the text, in characters or in words: rewards do not see tokens.

    Args:
        buffer: length of the line: the penalty begins at ``max_length - buffer``; absent stands for
            a fifth of ``max_length``, 0 for a step behind ``max_length``.
        unit: ``characters``, or ``words``: what white space separates.
    """
    length = len(completion) if unit == CHARACTERS else len(completion.split())
    width = max_length // 5 if buffer is None else buffer
    num_over = length - (max_length - width)
    detail = {"length": length}
    if num_over <= 0:
        return 0.0, detail
    if length >= max_length:
        return -penalty, detail
    return -penalty * num_over / width, detail


def check_length_penalty_params(params: Mapping[str, Any]) -> None:
    """Refuse what has the right type and makes no sense.

    Raises:
        RewardParamError: naming the parameter and its value.
    """
    max_length = params["max_length"]
    if max_length < 1:
        raise RewardParamError("max_length", f"is {max_length}, which is below 1")
    buffer = params.get("buffer")
    if buffer is not None and not 0 <= buffer <= max_length:
        raise RewardParamError("buffer", f"is {buffer}, not from 0 to max_length {max_length}")
    unit = params.get("unit", CHARACTERS)
    if unit not in UNITS:
        raise RewardParamError("unit", f"is {unit!r}, expected {' or '.join(UNITS)}")
    penalty = params.get("penalty", 1.0)
    if penalty < 0:
        raise RewardParamError("penalty", f"is {penalty}, which is below 0 and would be a reward")
