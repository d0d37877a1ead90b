"""The rewards by name: those built in, and those a configuration adds as ``module:function``.

Imported by the pool and by its workers; user modules are imported in the workers only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.scoring.rewards.code_tests import check_code_tests_params, code_tests
from rollout_server.scoring.rewards.exact_match import exact_match
from rollout_server.scoring.rewards.length_penalty import (
    check_length_penalty_params,
    length_penalty,
)
from rollout_server.scoring.rewards.math_answer import math_verify
from rollout_server.scoring.rewards.numeric_answer import (
    check_numeric_answer_params,
    numeric_answer,
)
from rollout_server.scoring.rewards.regex import check_regex_params, regex
from rollout_server.scoring.rewards.tag_format import check_tag_format_params, tag_format

RewardFunction = Callable[..., Any]
"""``(prompt, completion, answer, metadata, **params) -> float | (float, detail)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionalPackage:
    """A package that only some installations have."""

    name: str
    """As package indexes know it."""
    module: str
    """As it is imported."""
    extra: str
    """Of this project, which brings it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltinReward:
    """A reward of ours."""

    function: RewardFunction
    check_params: Callable[[Mapping[str, Any]], None] | None = None
    """Raises RewardParamError for values that have the right type and make no sense."""
    package: OptionalPackage | None = None
    """It cannot do without."""
    executes_code: bool = False
    """Runs code that requests and completions bring."""

    def why_unavailable(self, *, allows_code: bool) -> str | None:
        """What is missing for it here, and how to get it; None when nothing is.

        Args:
            allows_code: ``scoring.allow_code_execution``.
        """
        if self.executes_code and not allows_code:
            return (
                "executes code of completions and requests, and "
                "scoring.allow_code_execution is false"
            )
        if self.package is not None and importlib.util.find_spec(self.package.module) is None:
            return (
                f"needs the package {self.package.name}, which is not installed: "
                f"pip install 'slipstream-rollout[{self.package.extra}]'"
            )
        return None


BUILTIN_REWARDS: dict[str, BuiltinReward] = {
    "code_tests": BuiltinReward(
        function=code_tests, check_params=check_code_tests_params, executes_code=True
    ),
    "exact_match": BuiltinReward(function=exact_match),
    "format": BuiltinReward(function=tag_format, check_params=check_tag_format_params),
    "length_penalty": BuiltinReward(
        function=length_penalty, check_params=check_length_penalty_params
    ),
    "math_verify": BuiltinReward(
        function=math_verify,
        package=OptionalPackage(name="math-verify", module="math_verify", extra="math"),
    ),
    "numeric_answer": BuiltinReward(
        function=numeric_answer, check_params=check_numeric_answer_params
    ),
    "regex": BuiltinReward(function=regex, check_params=check_regex_params),
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
