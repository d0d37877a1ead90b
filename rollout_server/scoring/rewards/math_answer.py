"""Reward for a completion whose final expression is the reference answer, by ``math-verify``.

The package is the extra ``math``. It is imported when the first sample comes, since it brings
sympy, and workers are to be ready within a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MAX_SHOWN_CHARS = 200
"""Of each expression, in the detail."""
_MARKS = ("$", "\\boxed", "\\(", "\\[")
"""What a text has that says where in it the expression is."""


def math_verify(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    strict: bool = True,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> tuple[float, dict[str, Any]]:
    r"""``correct`` when the final expression equals the answer's, symbolically or numerically, else
    ``wrong``.

    Expressions are found and compared as ``math-verify`` does: LaTeX (``$...$``, ``\boxed{...}``)
    or plain numbers and formulas. The answer is one expression, or a text that marks it so. What
    takes longer than ``scoring.timeout_s`` is a timeout of its sample.

    Args:
        strict: ``math-verify``'s: names of variables count, and a set is not an interval.

    Raises:
        ValueError: the prompt came without an answer, or there is no expression in it.
    """
    from math_verify import verify

    if answer is None:
        raise ValueError("math_verify needs the prompt's answer, which is absent")
    expected = _read_answer(answer)
    if not expected:
        raise ValueError(f"math_verify finds no expression in the prompt's answer {answer[:80]!r}")
    found = _read(completion)
    # Its own time limits are signals of whole seconds; the pool's limit is enough.
    equal = bool(found) and verify(list(expected), found, strict=strict, timeout_seconds=None)
    detail = {"found": _shown(found), "expected": _shown(expected)}
    return (correct if equal else wrong), detail


@lru_cache(maxsize=256)
def _read_answer(answer: str) -> tuple[Any, ...]:
    """Samples of one group have the same answer."""
    if not any(mark in answer for mark in _MARKS):
        boxed = _read(f"\\boxed{{{answer}}}")
        if boxed:
            return tuple(boxed)
    return tuple(_read(answer))


def _read(text: str) -> list[Any]:
    """The expression of a text in the forms that may count, and as it was written; or nothing."""
    from math_verify import parse

    return list(parse(text, parsing_timeout=None))


def _shown(parsed: list[Any] | tuple[Any, ...]) -> str | None:
    return str(parsed[-1])[:MAX_SHOWN_CHARS] if parsed else None
