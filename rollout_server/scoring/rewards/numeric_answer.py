"""Reward for a completion whose final number is the reference answer."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from rollout_server.scoring.rewards.numbers import first_number, last_number
from rollout_server.scoring.signature import RewardParamError

DEFAULT_MARKERS = ("####", "answer:", "answer is", "=")
"""What usually stands before a final answer."""


def numeric_answer(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    marker: str | None = None,
    tolerance: float = 0.0,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> tuple[float, dict[str, Any]]:
    """``correct`` when the final number equals the answer's, else ``wrong``.

    The final number is the first one after the last marker; without a marker, or without a number
    after it, the last one of the text. The answer is read the same way, so that worked solutions
    (``... #### 72``) can be given as they are. Numbers are compared exactly: 0.1 + 0.2 is 0.3.

    Args:
        marker: text before the final number, any case; absent stands for the usual ones.
        tolerance: absolute difference that still counts as equal.

    Raises:
        ValueError: the prompt came without an answer, or there is no number in it.
    """
    if answer is None:
        raise ValueError("numeric_answer needs the prompt's answer, which is absent")
    markers = DEFAULT_MARKERS if marker is None else (marker,)
    expected = final_number(answer, markers)
    if expected is None:
        raise ValueError(f"numeric_answer finds no number in the prompt's answer {answer[:80]!r}")
    found = final_number(completion, markers)
    # Through str, a tolerance of 0.1 is one tenth and not the nearest binary fraction.
    equal = found is not None and abs(found - expected) <= Fraction(str(tolerance))
    detail = {"found": None if found is None else str(found), "expected": str(expected)}
    return (correct if equal else wrong), detail


def final_number(text: str, markers: tuple[str, ...]) -> Fraction | None:
    """The number a text ends up with; None when there is none."""
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = text  # a letter whose lower case is longer: positions would not agree
    ends = [
        position + len(marker)
        for marker in markers
        if (position := lowered.rfind(marker.lower())) >= 0
    ]
    if ends:
        marked = first_number(text[max(ends) :])
        if marked is not None:
            return marked
    return last_number(text)


def check_numeric_answer_params(params: Mapping[str, Any]) -> None:
    """Refuse what has the right type and makes no sense.

    Raises:
        RewardParamError: naming the parameter and its value.
    """
    tolerance = params.get("tolerance", 0.0)
    if tolerance < 0:
        raise RewardParamError("tolerance", f"is {tolerance}, which is below 0")
    if params.get("marker") == "":
        raise RewardParamError("marker", "is empty; leave it out for the usual markers")
