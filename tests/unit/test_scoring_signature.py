"""Reward parameters are read from signatures and checked before anything is generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from rollout_server.scoring.signature import RewardParamError, RewardSignature, read_signature


def typed(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: dict[str, Any],
    weight: float,
    name: str | None = None,
    *,
    exact: bool = False,
    options: list[str] | None = None,
) -> float:
    return weight


def untyped(prompt, completion, answer, metadata, factor=1):  # type: ignore[no-untyped-def]
    return factor


def open_ended(p: str, c: str, a: str | None, m: dict[str, Any], **params: Any) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("function", "params"),
    [
        (typed, {"weight": 1}),
        (typed, {"weight": 0.5, "name": None, "exact": True, "options": ["a"]}),
        (untyped, {"factor": {"anything": 1}}),
        (open_ended, {"whatever": 1}),
    ],
)
def test_fitting_parameters_pass(function: Callable[..., object], params: dict[str, Any]) -> None:
    read_signature(function).check(params)


@pytest.mark.parametrize(
    ("function", "params", "name"),
    [
        (typed, {}, "weight"),
        (typed, {"weight": "1"}, "weight"),
        (typed, {"weight": True}, "weight"),
        (typed, {"weight": float("nan")}, "weight"),
        (typed, {"weight": 1, "exact": 1}, "exact"),
        (typed, {"weight": 1, "name": 3}, "name"),
        (typed, {"weight": 1, "wieght": 2}, "wieght"),
        (typed, {"weight": 1, "prompt": "x"}, "prompt"),
        (untyped, {"metadata": 1}, "metadata"),
    ],
)
def test_a_wrong_parameter_is_named(
    function: Callable[..., object], params: dict[str, Any], name: str
) -> None:
    with pytest.raises(RewardParamError) as caught:
        read_signature(function).check(params)
    assert caught.value.name == name


def test_a_signature_survives_the_pipe() -> None:
    signature = read_signature(typed)
    assert RewardSignature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


async def coroutine(p: str, c: str, a: str, m: dict[str, Any]) -> float:
    return 0.0


@pytest.mark.parametrize("function", [lambda completion: 1.0, coroutine])
def test_a_function_that_cannot_be_called_as_a_reward_is_refused(
    function: Callable[..., object],
) -> None:
    with pytest.raises(TypeError):
        read_signature(function)
