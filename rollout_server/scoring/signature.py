"""Which parameters a reward function takes, read from its Python signature.

A reward is called as ``reward(prompt, completion, answer, metadata, **params)``. Everything after
the first four is a parameter that requests may set. Signatures of user rewards are read in the
worker, where their module is imported, and travel to the pool as JSON.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

NUM_FIXED_ARGUMENTS = 4
"""prompt, completion, answer, metadata."""

_KIND_OF_TYPE: dict[object, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    types.NoneType: "null",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardParam:
    """One parameter of a reward."""

    required: bool
    kinds: list[str] | None
    """JSON kinds it accepts: bool, int, float, str, null; None accepts any value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSignature:
    """The parameters of a reward."""

    params: dict[str, RewardParam]
    accepts_any: bool
    """True for a function with ``**kwargs``."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            params={name: RewardParam(**param) for name, param in data["params"].items()},
            accepts_any=data["accepts_any"],
        )

    def check(self, params: Mapping[str, object]) -> None:
        """Check a request's parameters.

        Raises:
            RewardParamError: unknown, missing or of the wrong type.
        """
        for name, value in params.items():
            param = self.params.get(name)
            if param is None:
                if self.accepts_any:
                    continue
                known = ", ".join(self.params) or "none"
                raise RewardParamError(name, f"is not a parameter (known: {known})")
            if param.kinds is not None and not _fits(value, param.kinds):
                raise RewardParamError(name, f"is {value!r}, expected {' or '.join(param.kinds)}")
        for name, param in self.params.items():
            if param.required and name not in params:
                raise RewardParamError(name, "is required and absent")


class RewardParamError(ValueError):
    """A reward parameter is wrong. ``name`` is the parameter's."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"parameter {name!r} {problem}")
        self.name = name


def read_signature(function: Callable[..., object]) -> RewardSignature:
    """Read a reward's parameters.

    Raises:
        TypeError: the function cannot be called as a reward is.
    """
    if inspect.iscoroutinefunction(function):
        raise TypeError("a reward must be a plain function, not a coroutine function")
    signature = inspect.signature(function)
    signature.bind_partial(*([None] * NUM_FIXED_ARGUMENTS))
    try:
        hints = typing.get_type_hints(function)
    # Annotations of user code are arbitrary expressions; without them any value is accepted.
    except Exception:  # noqa: BLE001
        hints = {}
    params: dict[str, RewardParam] = {}
    accepts_any = False
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            accepts_any = True
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY or (
            parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            and position >= NUM_FIXED_ARGUMENTS
        ):
            params[parameter.name] = RewardParam(
                required=parameter.default is inspect.Parameter.empty,
                kinds=_kinds_of(hints.get(parameter.name)),
            )
    return RewardSignature(params=params, accepts_any=accepts_any)


def _kinds_of(hint: object) -> list[str] | None:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (types.NoneType if hint is None else hint,)
    kinds = [_KIND_OF_TYPE.get(member) for member in members]
    known = [kind for kind in kinds if kind is not None]
    return known if len(known) == len(kinds) and hint is not None else None


def _fits(value: object, kinds: list[str]) -> bool:
    match value:
        case bool():
            return "bool" in kinds
        case int():
            return "int" in kinds or "float" in kinds
        case float():
            return "float" in kinds and math.isfinite(value)
        case str():
            return "str" in kinds
        case None:
            return "null" in kinds
        case _:
            return False
