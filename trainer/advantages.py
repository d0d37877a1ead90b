"""Group-centred advantages (pure). GRPO: https://arxiv.org/abs/2402.03300; Dr. GRPO: 2503.20783."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.samples import ScoredGroup, TrainingSample, to_training_sample

STD_EPSILON = 1e-6
"""Keeps the division finite for groups whose rewards are nearly equal."""


def group_advantages(rewards: Sequence[float], *, normalize_by_std: bool) -> list[float]:
    """Reward minus the group's mean, per sample; they sum to zero.

    With ``normalize_by_std`` also divided by the group's (population) standard deviation: rewards
    ``[1, 0, 0, 0]`` give ``[1.732, -0.577, -0.577, -0.577]``, without it ``[0.75, -0.25, ...]``.

    Raises:
        ValueError: an empty group.
    """
    if not rewards:
        raise ValueError("a group needs at least one reward")
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not normalize_by_std:
        return centred
    std = math.sqrt(math.fsum(value * value for value in centred) / len(centred))
    return [value / (std + STD_EPSILON) for value in centred]


def with_advantages(
    groups: Sequence[ScoredGroup], *, normalize_by_std: bool
) -> list[TrainingSample]:
    """All samples of the groups, in order, each with its advantage."""
    return [
        to_training_sample(group.prompt_token_ids, sample, advantage)
        for group in groups
        for sample, advantage in zip(
            group.samples,
            group_advantages(group.rewards, normalize_by_std=normalize_by_std),
            strict=True,
        )
    ]
