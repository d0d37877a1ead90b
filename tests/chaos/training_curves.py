"""Compares curves of calm and of disturbed training runs (pure)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z = 2.0
"""Standard errors that two means may be apart by chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One run, by its records of ``metrics.jsonl``."""

    seed: int
    rewards: list[float]
    """Mean of every step."""
    accuracies: list[tuple[int, float]]
    """``(step, held-out accuracy)``."""
    durations_s: list[float]
    """Of every step."""
    steps_hit: list[int]
    num_stale: int
    """Samples that were not trained on because their policy was too old."""

    @property
    def final_accuracy(self) -> float:
        return self.accuracies[-1][1]


def curve_of(records: Sequence[dict[str, Any]], seed: int, steps_hit: Sequence[int]) -> Curve:
    """Of a run that is over.

    Raises:
        ValueError: a step is missing, or there twice.
    """
    steps = [record for record in records if record["step"] > 0]
    numbers = [record["step"] for record in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise ValueError(f"the steps of seed {seed} are {numbers}")
    return Curve(
        seed=seed,
        rewards=[record["reward/mean"] for record in steps],
        accuracies=[
            (record["step"], record["eval/accuracy"])
            for record in records
            if record.get("eval/accuracy") is not None
        ],
        durations_s=[record["step/duration_s"] for record in steps],
        steps_hit=list(steps_hit),
        num_stale=sum(record["batch/num_stale"] for record in steps),
    )


def comparison(calm: Sequence[Curve], hit: Sequence[Curve]) -> dict[str, Any]:
    """Is what kills do to the curves more than what another seed does?

    ``useful_time_ratio`` is the time that the same steps take when nothing dies, over the time that
    they took. What a kill costs (``lost_s_per_kill``) is an engine for as long as it takes to come
    back, at most: the ratio is one of steps as long as ``step_s``, the median of calm ones.
    """
    final = {
        "calm": [curve.final_accuracy for curve in calm],
        "hit": [curve.final_accuracy for curve in hit],
    }
    difference = statistics.mean(final["hit"]) - statistics.mean(final["calm"])
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in final.values()))
    num_hit = sum(len(curve.steps_hit) for curve in hit)
    lost_s = _seconds(hit) - _seconds(calm)
    return {
        "seeds": [curve.seed for curve in calm],
        "final_accuracy": final,
        "accuracy_difference": round(difference, 4),
        "standard_error": round(error, 4),
        "within_seed_noise": abs(difference) <= Z * error,
        "reward_gap_between_seeds": _mean_gap(itertools.combinations(calm, 2)),
        "reward_gap_calm_to_hit": _mean_gap(zip(calm, hit, strict=True)),
        "kills": num_hit,
        "share_of_steps_hit": round(num_hit / sum(len(c.durations_s) for c in hit), 3),
        "step_s": round(statistics.median(s for c in calm for s in c.durations_s), 2),
        "lost_s_per_kill": round(lost_s / num_hit, 2) if num_hit else None,
        "useful_time_ratio": round(_seconds(calm) / _seconds(hit), 3),
    }


def _seconds(curves: Sequence[Curve]) -> float:
    return sum(sum(curve.durations_s) for curve in curves)


def _mean_gap(pairs: Any) -> float:
    """Of the rewards of a step, over all steps and pairs."""
    gaps = [
        abs(one - other) for a, b in pairs for one, other in zip(a.rewards, b.rewards, strict=True)
    ]
    return round(statistics.mean(gaps), 4)
