"""The judge's behaviour policy, and which of its rows rounding decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.schemas.rollouts import SamplingOptions
from tests.support.judge import behaviour_logprobs, support_is_blurred

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


def row(probabilities: list[float]) -> torch.Tensor:
    """Logits [1, V]."""
    return torch.tensor([probabilities]).log()


def is_blurred(probabilities: list[float], setting: dict[str, Any]) -> bool:
    sampling = SamplingOptions.model_validate(setting)
    return bool(support_is_blurred(row(probabilities), [0], [0], sampling).item())


@pytest.mark.parametrize(
    ("setting", "num_left"),
    [({"top_p": 0.8}, 3), ({"top_k": 2}, 2), ({"min_p": 0.25}, 3), ({}, 4)],
)
def test_clear_edges_leave_the_same_tokens_to_every_engine(
    setting: dict[str, Any], num_left: int
) -> None:
    assert not is_blurred(PROBABILITIES, setting)
    sampling = SamplingOptions.model_validate(setting)
    logprobs_1V = behaviour_logprobs(row(PROBABILITIES), [0], [0], sampling)
    assert int(logprobs_1V.isfinite().sum()) == num_left


@pytest.mark.parametrize(
    "setting", [{"top_p": 0.75}, {"top_p": 0.9}, {"min_p": 0.5}, {"min_p": 0.2}]
)
def test_an_edge_on_a_token_is_blurred(setting: dict[str, Any]) -> None:
    assert is_blurred(PROBABILITIES, setting)


def test_a_tie_is_an_edge_of_top_k_only_where_top_k_ends() -> None:
    tied = [0.4, 0.25, 0.25, 0.1]
    assert is_blurred(tied, {"top_k": 2})
    assert not is_blurred(tied, {"top_k": 1})
    assert not is_blurred(tied, {"top_k": 3})
    assert not is_blurred(tied, {"top_k": 4}), "no token is cut"
    assert not is_blurred(tied, {})
