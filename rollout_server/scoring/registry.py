"""The rewards by name: those built in, and those a configuration adds as ``module:function``.

Imported by the pool and by its workers; user modules are imported in the workers only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.scoring.rewards.exact_match import exact_match
from rollout_server.scoring.rewards.numeric_answer import (
    check_numeric_answer_params,
    numeric_answer,
)

RewardFunction = Callable[..., Any]
"""``(prompt, completion, answer, metadata, **params) -> float | (float, detail)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltinReward:
    """A reward of ours."""

    function: RewardFunction
    check_params: Callable[[Mapping[str, Any]], None] | None = None
    """Raises RewardParamError for values that have the right type and make no sense."""


BUILTIN_REWARDS: dict[str, BuiltinReward] = {
    "exact_match": BuiltinReward(function=exact_match),
    "numeric_answer": BuiltinReward(
        function=numeric_answer, check_params=check_numeric_answer_params
    ),
}


def import_reward(target: str) -> RewardFunction:
    """Import ``module:function``; the function may be a dotted path inside the module.

    Raises:
        ValueError: not of that form.
        ImportError, AttributeError, TypeError: no such module or function, or not callable.
    """
    module_name, separator, path = target.partition(":")
    if not separator or not module_name or not path:
        raise ValueError(f"{target!r} is not of the form module:function")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]  # checked to be callable
