"""The records that flow through a training step, and which rollouts are fit to train on (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shared.schemas.rollouts import RolloutGroup, RolloutSample
from shared.types import FinishReason, RewardStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One completion with what the objective needs. Tokens are the engine's own, never re-made."""

    prompt_token_ids: list[int]  # [num_prompt_tokens]
    completion_token_ids: list[int]  # [num_completion_tokens]
    behaviour_logprobs: list[float]  # [num_completion_tokens]
    min_weight_version: int
    max_weight_version: int
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """The usable samples of one prompt with their rewards."""

    prompt_token_ids: list[int]
    samples: list[RolloutSample]
    rewards: list[float]  # [len(samples)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is trained on, and how much was left out and why."""

    groups: list[ScoredGroup]
    num_stale: int
    num_aborted: int
    num_unscored: int
    num_empty: int
    num_groups_without_signal: int


IsStale = Callable[[RolloutSample], bool]
"""Whether a sample's policy is too old to train on."""


def stale_when_delivered(sample: RolloutSample) -> bool:
    """As the server judged it. Later it can only have become older."""
    return sample.stale


def unfit_prompts(groups: Iterable[RolloutGroup], num_prompts: int, is_stale: IsStale) -> list[int]:
    """Prompts to sample again: their group is absent, or has samples that are aborted or stale."""
    fit = {
        group.prompt_index
        for group in groups
        if not any(
            sample.finish_reason is FinishReason.ABORT or is_stale(sample)
            for sample in group.samples
        )
    }
    return [index for index in range(num_prompts) if index not in fit]


def select(groups: Iterable[RolloutGroup], is_stale: IsStale = stale_when_delivered) -> Selection:
    """Drop samples that are stale, aborted, unscored or empty, then groups without signal.

    A group has no signal when fewer than two samples are left or all its rewards are equal: every
    advantage in it would be zero.
    """
    kept: list[ScoredGroup] = []
    num_stale = num_aborted = num_unscored = num_empty = num_without_signal = 0
    for group in groups:
        usable: list[RolloutSample] = []
        rewards: list[float] = []
        for sample in group.samples:
            if sample.finish_reason is FinishReason.ABORT:
                num_aborted += 1
            elif is_stale(sample):
                num_stale += 1
            elif sample.reward is None or sample.reward_status is not RewardStatus.OK:
                num_unscored += 1
            elif not sample.token_ids:
                num_empty += 1
            else:
                usable.append(sample)
                rewards.append(sample.reward)
        if len(usable) < 2 or min(rewards) == max(rewards):
            num_without_signal += 1
            continue
        kept.append(
            ScoredGroup(prompt_token_ids=group.prompt_token_ids, samples=usable, rewards=rewards)
        )
    return Selection(
        groups=kept,
        num_stale=num_stale,
        num_aborted=num_aborted,
        num_unscored=num_unscored,
        num_empty=num_empty,
        num_groups_without_signal=num_without_signal,
    )


def to_training_sample(
    prompt_token_ids: Sequence[int], sample: RolloutSample, advantage: float
) -> TrainingSample:
    """Attach an advantage to a usable sample."""
    versions = [span.version for span in sample.weight_versions]
    return TrainingSample(
        prompt_token_ids=list(prompt_token_ids),
        completion_token_ids=sample.token_ids,
        behaviour_logprobs=sample.logprobs,
        min_weight_version=min(versions, default=0),
        max_weight_version=max(versions, default=0),
        advantage=advantage,
    )
