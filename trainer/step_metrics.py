"""The line of ``metrics.jsonl`` for one step, from what happened in it (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.schemas.rollouts import RolloutSample
from trainer.collection import SampledBatch
from trainer.policy_history import PolicyHistory
from trainer.publish import PushReport
from trainer.samples import Selection
from trainer.speculation_log import DraftCounts, mean_acceptance_length
from trainer.update import UpdateReport


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """Everything a step leaves behind. ``update`` and ``push`` are None when nothing was learnt."""

    step: int
    time_s: float
    """Unix time of the step's end."""
    duration_s: float
    """From wanting the batch to the end of the push."""
    batch: SampledBatch
    selection: Selection
    history: PolicyHistory
    """As it was when the batch was trained on."""
    update: UpdateReport | None
    push: PushReport | None
    weight_version: int
    """After the step."""
    draft_counts_before: dict[str, DraftCounts]
    draft_counts_after: dict[str, DraftCounts]


def step_metrics(facts: StepFacts) -> dict[str, float | int | None]:
    """Flat ``component/name`` keys. A value that does not exist this step is None."""
    samples = [sample for group in facts.batch.groups for sample in group.samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    lengths = [len(sample.token_ids) for sample in samples]
    reward_mean, reward_std = _mean_and_std(rewards)
    timing = facts.batch.timing
    sample_s = timing.sample_s
    selection, update, push = facts.selection, facts.update, facts.push
    record: dict[str, float | int | None] = {
        "step": facts.step,
        "time_s": facts.time_s,
        "reward/mean": reward_mean,
        "reward/std": reward_std,
        "rollout/num_samples": len(samples),
        "rollout/num_completion_tokens": sum(lengths),
        "rollout/tokens_per_s": sum(lengths) / sample_s if sample_s > 0 else None,
        "rollout/mean_completion_tokens": sum(lengths) / len(lengths) if lengths else None,
        "rollout/max_completion_tokens": max(lengths, default=None),
        "rollout/truncated_fraction": (
            sum(sample.finish_reason.value == "length" for sample in samples) / len(samples)
            if samples
            else None
        ),
        "rollout/sample_s": sample_s,
        "rollout/hidden_fraction": timing.hidden_fraction,
        "rollout/num_groups_again": facts.batch.num_groups_again,
        "rollout/num_draft_tokens": sum(sample.num_draft_tokens for sample in samples),
        "rollout/num_accepted_tokens": sum(sample.num_accepted_tokens for sample in samples),
        "rollout/mean_acceptance_length": mean_acceptance_length(
            facts.draft_counts_before, facts.draft_counts_after
        ),
        "batch/num_groups": len(selection.groups),
        "batch/num_groups_without_signal": selection.num_groups_without_signal,
        "batch/num_stale": selection.num_stale,
        "batch/num_aborted": selection.num_aborted,
        "batch/num_unscored": selection.num_unscored,
        "batch/num_empty": selection.num_empty,
        "weights/version": facts.weight_version,
        "phase/rollout_s": timing.wait_s,
        "step/duration_s": facts.duration_s,
        "step/tokens_per_s": sum(lengths) / facts.duration_s if facts.duration_s > 0 else None,
    }
    record |= _lag_metrics(samples, facts.history)
    if update is not None:
        record |= {
            "loss/policy": update.loss,
            "loss/clip_fraction": update.clip_fraction,
            "loss/importance_weight": update.importance_weight,
            "loss/truncated_fraction": update.truncated_fraction,
            "policy/entropy": update.entropy,
            "policy/mismatch_kl": update.mismatch_kl,
            "policy/update_kl": update.policy_kl,
            "policy/max_logprob_diff": update.max_logprob_diff,
            "optimizer/grad_norm": update.grad_norm,
            "optimizer/learning_rate": update.learning_rate,
            "optimizer/num_updates": update.num_updates,
            "phase/logprob_s": update.logprob_s,
            "phase/train_s": update.train_s,
        }
    if push is not None:
        record |= {
            "weights/push_s": push.push_s,
            "weights/paused_s": push.paused_s,
            "weights/num_bytes": push.num_bytes,
            "weights/sent_bytes": push.sent_bytes,
            "phase/publish_s": push.push_s,
        }
    return record


def _lag_metrics(
    samples: Sequence[RolloutSample], history: PolicyHistory
) -> dict[str, float | int | None]:
    """How far behind the policy that is trained its samples are, in steps that changed it."""
    lags = [history.lag(sample.weight_versions) for sample in samples]
    known = [lag for lag in lags if lag is not None]
    versions = [span.version for sample in samples for span in sample.weight_versions]
    return {
        "lag/max": max(known, default=None),
        "lag/mean": sum(known) / len(known) if known else None,
        "lag/num_unknown": len(lags) - len(known),
        "lag/oldest_version": min(versions, default=None),
        "lag/newest_version": max(versions, default=None),
        **{f"lag/num_samples_{lag}": known.count(lag) for lag in sorted(set(known))},
    }


def _mean_and_std(values: list[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
