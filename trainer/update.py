"""One training step on a batch of samples: score, epochs of minibatches, optimizer updates.

Called by the loop; knows nothing of HTTP, files or versions beyond the number it compares with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.config.trainer import TrainerConfig
from trainer.batching import MicroBatch, build_micro_batches, split_into_minibatches
from trainer.loss import LossSums, grpo_loss
from trainer.optimization import Optimization
from trainer.policy import Policy
from trainer.samples import TrainingSample


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What happened, averaged over completion tokens unless said otherwise."""

    num_updates: int
    loss: float
    grad_norm: float
    learning_rate: float
    clip_fraction: float
    entropy: float
    mismatch_kl: float
    policy_kl: float
    importance_weight: float
    truncated_fraction: float
    max_logprob_diff: float | None
    """Largest |policy - behaviour| over samples of the current weight version, before any update
    of this step; None when there is no such sample."""
    logprob_s: float
    train_s: float


class _Totals:
    """Accumulates over all micro-batches of a step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.entropy = 0.0
        self.sums = [0.0] * 6
        self.max_logprob_diff: float | None = None

    def add(self, loss: torch.Tensor, sums: LossSums, entropy_BT: torch.Tensor) -> None:
        self.loss += float(loss.detach())
        self.entropy += float(entropy_BT.sum())
        parts = (
            sums.num_tokens,
            sums.num_clipped,
            sums.importance_weight,
            sums.num_truncated,
            sums.mismatch_kl,
            sums.policy_kl,
        )
        self.sums = [total + float(part) for total, part in zip(self.sums, parts, strict=True)]

    def compare(self, logprobs_BT: torch.Tensor, batch: MicroBatch, rows_B: torch.Tensor) -> None:
        """Note the largest difference to the engine's logprobs in the rows that are comparable."""
        if not rows_B.any():
            return
        difference_BT = (logprobs_BT.detach() - batch.behaviour_logprobs_BT).abs()
        mask_BT = batch.completion_mask_BT & rows_B.unsqueeze(1)
        largest = float(difference_BT.masked_fill(~mask_BT, 0.0).max())
        self.max_logprob_diff = max(largest, self.max_logprob_diff or 0.0)


def train_on(
    samples: Sequence[TrainingSample],
    *,
    policy: Policy,
    optimization: Optimization,
    config: TrainerConfig,
    weight_version: int,
    seed: str,
) -> UpdateReport:
    """Update the policy with every sample ``epochs_per_batch`` times.

    With a single update per step the policy at the start *is* the policy being differentiated, so
    its logprobs come from the same forward pass; with several updates they are computed first.

    Args:
        weight_version: version of the policy's weights now.
        seed: of the minibatch shuffles; the same seed gives the same update.

    Raises:
        SlipstreamError: a gradient is not finite.
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("cannot train on zero samples")
    options = config.optimizer
    temperature = config.sampling.temperature
    single_update = options.epochs_per_batch * options.minibatches_per_epoch == 1
    totals = _Totals()

    started_s = time.monotonic()
    proximal: dict[int, torch.Tensor] = {}
    if not single_update:
        proximal = _proximal_logprobs(samples, policy, config, totals, weight_version)
    logprob_s = time.monotonic() - started_s

    started_s = time.monotonic()
    grad_norms: list[float] = []
    learning_rate = 0.0
    for epoch in range(options.epochs_per_batch):
        for indices in split_into_minibatches(
            len(samples), options.minibatches_per_epoch, f"{seed}/{epoch}"
        ):
            num_tokens = sum(len(samples[index].completion_token_ids) for index in indices)
            optimization.zero_grad()
            for batch in _micro_batches(samples, indices, policy, config):
                scores = policy.score(batch, temperature)
                if single_update:
                    proximal_BT = scores.logprobs_BT.detach()
                    totals.compare(
                        proximal_BT, batch, _same_version(samples, batch, weight_version)
                    )
                else:
                    proximal_BT = _gather_rows(proximal, batch)
                loss, sums = grpo_loss(
                    scores.logprobs_BT,
                    proximal_BT,
                    batch.behaviour_logprobs_BT,
                    batch.advantages_B,
                    batch.completion_mask_BT,
                    num_minibatch_tokens=num_tokens,
                    objective=config.objective,
                )
                loss.backward()
                totals.add(loss, sums, scores.entropy_BT)
            stats = optimization.step()
            grad_norms.append(stats.grad_norm)
            learning_rate = stats.learning_rate
    num_tokens_seen, num_clipped, weight, num_truncated, mismatch_kl, policy_kl = totals.sums
    return UpdateReport(
        num_updates=len(grad_norms),
        loss=totals.loss / len(grad_norms),
        grad_norm=sum(grad_norms) / len(grad_norms),
        learning_rate=learning_rate,
        clip_fraction=num_clipped / num_tokens_seen,
        entropy=totals.entropy / num_tokens_seen,
        mismatch_kl=mismatch_kl / num_tokens_seen,
        policy_kl=policy_kl / num_tokens_seen,
        importance_weight=weight / num_tokens_seen,
        truncated_fraction=num_truncated / num_tokens_seen,
        max_logprob_diff=totals.max_logprob_diff,
        logprob_s=logprob_s,
        train_s=time.monotonic() - started_s,
    )


@torch.no_grad()
def _proximal_logprobs(
    samples: Sequence[TrainingSample],
    policy: Policy,
    config: TrainerConfig,
    totals: _Totals,
    weight_version: int,
) -> dict[int, torch.Tensor]:
    """Sample index -> logprobs over its own tokens (prompt positions are 0), before any update."""
    found: dict[int, torch.Tensor] = {}
    for batch in _micro_batches(samples, range(len(samples)), policy, config):
        logprobs_BT = policy.score(batch, config.sampling.temperature).logprobs_BT
        totals.compare(logprobs_BT, batch, _same_version(samples, batch, weight_version))
        for row, index in enumerate(batch.sample_indices):
            found[index] = logprobs_BT[row, : samples[index].num_tokens]
    return found


def _micro_batches(
    samples: Sequence[TrainingSample],
    indices: Sequence[int],
    policy: Policy,
    config: TrainerConfig,
) -> list[MicroBatch]:
    batches = build_micro_batches(
        samples,
        indices,
        token_budget=config.optimizer.micro_batch_tokens,
        pad_token_id=policy.pad_token_id,
    )
    return [batch.to(policy.device) for batch in batches]


def _gather_rows(logprobs: dict[int, torch.Tensor], batch: MicroBatch) -> torch.Tensor:
    gathered_BT = torch.zeros_like(batch.behaviour_logprobs_BT)
    for row, index in enumerate(batch.sample_indices):
        gathered_BT[row, : logprobs[index].shape[0]] = logprobs[index]
    return gathered_BT


def _same_version(
    samples: Sequence[TrainingSample], batch: MicroBatch, weight_version: int
) -> torch.Tensor:
    return torch.tensor(
        [
            samples[index].min_weight_version == weight_version
            and samples[index].max_weight_version == weight_version
            for index in batch.sample_indices
        ],
        device=batch.input_ids_BT.device,
    )
