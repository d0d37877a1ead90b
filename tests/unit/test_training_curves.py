"""Whether kills change what training comes to: the arithmetic of ``make chaos-training``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.training_curves import Curve, comparison, curve_of


def records(rewards: list[float], accuracies: dict[int, float]) -> list[dict[str, Any]]:
    steps = [
        {
            "step": step,
            "reward/mean": reward,
            "step/duration_s": 2.0,
            "batch/num_stale": 1,
            "eval/accuracy": accuracies.get(step),
        }
        for step, reward in enumerate(rewards, start=1)
    ]
    return [{"step": 0, "eval/accuracy": accuracies[0]}, *steps]


def curve(seed: int, accuracy: float, reward: float = 0.5, duration_s: float = 2.0) -> Curve:
    return Curve(
        seed=seed,
        rewards=[reward] * 4,
        accuracies=[(4, accuracy)],
        durations_s=[duration_s] * 4,
        steps_hit=[2],
        num_stale=0,
    )


def test_a_run_is_read_from_its_records() -> None:
    found = curve_of(records([0.1, 0.2], {0: 0.3, 2: 0.4}), 7, [1])
    assert found.rewards == [0.1, 0.2]
    assert found.accuracies == [(0, 0.3), (2, 0.4)]
    assert (found.final_accuracy, found.num_stale, found.seed) == (0.4, 2, 7)


@pytest.mark.parametrize("numbers", [[1, 1], [1, 3], [2]])
def test_steps_that_are_missing_or_there_twice_are_refused(numbers: list[int]) -> None:
    lines = records([0.1] * len(numbers), {0: 0.3})
    for line, number in zip(lines[1:], numbers, strict=True):
        line["step"] = number
    with pytest.raises(ValueError, match="seed 0"):
        curve_of(lines, 0, [])


@pytest.mark.parametrize(
    ("hit", "is_within"), [([0.80, 0.84, 0.82], True), ([0.60, 0.64, 0.62], False)]
)
def test_a_difference_beyond_that_of_seeds_is_seen(hit: list[float], is_within: bool) -> None:
    calm = [curve(seed, accuracy) for seed, accuracy in enumerate([0.81, 0.85, 0.80])]
    result = comparison(calm, [curve(seed, accuracy) for seed, accuracy in enumerate(hit)])
    assert result["within_seed_noise"] is is_within


def test_gaps_of_rewards_and_useful_time() -> None:
    calm = [curve(0, 0.8, reward=0.5), curve(1, 0.9, reward=0.7)]
    hit = [curve(0, 0.8, reward=0.6, duration_s=2.5), curve(1, 0.9, reward=0.6, duration_s=2.5)]
    result = comparison(calm, hit)
    assert result["reward_gap_between_seeds"] == 0.2
    assert result["reward_gap_calm_to_hit"] == 0.1
    assert result["useful_time_ratio"] == 0.8
    assert (result["step_s"], result["lost_s_per_kill"]) == (2.0, 2.0)
    assert (result["kills"], result["share_of_steps_hit"]) == (2, 0.25)
