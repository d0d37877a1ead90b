"""Reward for a completion in which a pattern is found."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from rollout_server.scoring.signature import RewardParamError

MAX_PATTERN_CHARS = 1000
MAX_FOUND_CHARS = 200
"""Of the match, in the detail."""


def regex(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    pattern: str,
    whole: bool = False,
    ignore_case: bool = False,
    multi_line: bool = False,
    dot_all: bool = False,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> tuple[float, dict[str, Any]]:
    """``correct`` when the pattern is found in the completion, else ``wrong``.

    A pattern that backtracks without end is a timeout of its sample, and costs a worker.

    Args:
        pattern: in the syntax of Python's ``re``.
        whole: the pattern has to match the whole completion.
        ignore_case: upper and lower case do not count.
        multi_line: ``^`` and ``$`` match at every line.
        dot_all: ``.`` matches line ends too.
    """
    compiled = re.compile(pattern, _flags(ignore_case, multi_line, dot_all))
    match = compiled.fullmatch(completion) if whole else compiled.search(completion)
    if match is None:
        return wrong, {"found": None}
    return correct, {"found": match[0][:MAX_FOUND_CHARS], "start": match.start()}


def _flags(ignore_case: bool, multi_line: bool, dot_all: bool) -> int:
    return (
        (re.IGNORECASE if ignore_case else 0)
        | (re.MULTILINE if multi_line else 0)
        | (re.DOTALL if dot_all else 0)
    )


def check_regex_params(params: Mapping[str, Any]) -> None:
    """Refuse what is no pattern.

    Raises:
        RewardParamError: naming the parameter and what is wrong with it.
    """
    pattern = params["pattern"]
    if not pattern:
        raise RewardParamError("pattern", "is empty, and would be found everywhere")
    if len(pattern) > MAX_PATTERN_CHARS:
        raise RewardParamError(
            "pattern", f"has {len(pattern)} characters, above the limit of {MAX_PATTERN_CHARS}"
        )
    # Only parsed: compiling expands character classes, and a few hundred of those would hold up the
    # API for seconds. The name is private; it is there in Python 3.11 and 3.12.
    parse = importlib.import_module("re._parser").parse
    try:
        parse(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as exc:
        raise RewardParamError("pattern", f"is no regular expression: {exc}") from exc
