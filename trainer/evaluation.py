"""Held-out accuracy from scored rollouts (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.schemas.rollouts import RolloutGroup

FULL_REWARD = 1.0
"""A sample counts as correct from this reward on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """One pass over the held-out problems."""

    num_problems: int
    num_unscored: int
    """Samples whose reward failed; they count as wrong."""
    accuracy: float
    """Fraction with full reward."""
    mean_reward: float
    mean_completion_tokens: float


def evaluate_groups(groups: Iterable[RolloutGroup]) -> EvaluationResult:
    """Sum up an evaluation request.

    Raises:
        ValueError: no samples at all.
    """
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        raise ValueError("an evaluation needs at least one sample")
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    return EvaluationResult(
        num_problems=len(samples),
        num_unscored=len(samples) - len(rewards),
        accuracy=sum(reward >= FULL_REWARD for reward in rewards) / len(samples),
        mean_reward=sum(rewards) / len(samples),
        mean_completion_tokens=num_tokens / len(samples),
    )


def evaluation_metrics(result: EvaluationResult, eval_s: float) -> dict[str, float | None]:
    """For the line of the step after which it was done."""
    return {
        "eval/accuracy": result.accuracy,
        "eval/mean_reward": result.mean_reward,
        "eval/mean_completion_tokens": result.mean_completion_tokens,
        "phase/eval_s": eval_s,
    }
