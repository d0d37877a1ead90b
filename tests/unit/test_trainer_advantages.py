"""Selection of samples, and advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from shared.types import FinishReason, RewardStatus
from tests.fakes.rollouts import rollout_group, rollout_sample
from trainer.advantages import group_advantages, with_advantages
from trainer.samples import select


def test_one_right_answer_in_four() -> None:
    assert group_advantages([1, 0, 0, 0], normalize_by_std=False) == [0.75, -0.25, -0.25, -0.25]
    # Standard deviation: sqrt(0.75 * 0.25) = 0.4330.
    expected = [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    found = group_advantages([1, 0, 0, 0], normalize_by_std=True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_advantages_do_not_depend_on_shift_and_normalized_ones_not_on_scale() -> None:
    rewards = [0.3, 0.9, 0.1, 0.5]
    moved = [10 + 4 * reward for reward in rewards]
    found = group_advantages(moved, normalize_by_std=True)
    assert found == pytest.approx(group_advantages(rewards, normalize_by_std=True), rel=1e-4)
    assert sum(found) == pytest.approx(0.0, abs=1e-9)


def test_equal_rewards_give_zero_and_not_a_division_by_zero() -> None:
    assert group_advantages([0.7] * 3, normalize_by_std=True) == pytest.approx([0.0] * 3, abs=1e-6)


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        group_advantages([], normalize_by_std=True)


def test_unusable_samples_are_left_out_and_counted_by_reason() -> None:
    group = rollout_group(
        samples=[
            rollout_sample(0, reward=1.0),
            rollout_sample(1, reward=0.0),
            rollout_sample(2, reward=1.0, stale=True),
            rollout_sample(3, reward=1.0, finish_reason=FinishReason.ABORT),
            rollout_sample(4, reward=None, reward_status=RewardStatus.TIMEOUT),
            rollout_sample(5, reward=1.0, token_ids=[]),
        ]
    )
    selection = select([group])
    (kept,) = selection.groups
    assert [sample.sample_index for sample in kept.samples] == [0, 1]
    counts = (
        selection.num_stale,
        selection.num_aborted,
        selection.num_unscored,
        selection.num_empty,
    )
    assert counts == (1, 1, 1, 1)


def test_groups_without_signal_are_left_out() -> None:
    all_right = rollout_group(samples=[rollout_sample(i, reward=1.0) for i in range(3)])
    alone = rollout_group(
        samples=[rollout_sample(0, reward=1.0), rollout_sample(1, reward=0.0, stale=True)]
    )
    mixed = rollout_group(samples=[rollout_sample(0, reward=1.0), rollout_sample(1, reward=0.0)])
    selection = select([all_right, alone, mixed])
    assert len(selection.groups) == 1
    assert selection.num_groups_without_signal == 2


def test_each_sample_gets_the_advantage_of_its_own_group() -> None:
    groups = [
        rollout_group(samples=[rollout_sample(0, reward=1.0), rollout_sample(1, reward=0.0)]),
        rollout_group(samples=[rollout_sample(0, reward=0.0), rollout_sample(1, reward=10.0)]),
    ]
    samples = with_advantages(select(groups).groups, normalize_by_std=False)
    assert [sample.advantage for sample in samples] == [0.5, -0.5, -5.0, 5.0]
