"""The clipped GRPO objective with truncated importance correction (pure, no model).

Shape legend: B sequences, T tokens. Logprobs at ``[b, t]`` belong to token ``t`` (see batching.py).

Three policies: *behaviour* sampled the tokens (the engine, perhaps a few versions ago and with its
own kernels); *proximal* is the trainer's at the start of the step, around which the ratio is
clipped; *policy* is being optimized. Per completion token, with A the sample's advantage::

    weight = min(exp(proximal - behaviour), importance_cap)      no gradient
    ratio  = exp(policy - proximal)
    loss   = -weight * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

summed and divided by the number of completion tokens of the whole minibatch, so that every token
counts the same however the minibatch is cut into micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.config.trainer import ObjectiveConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """Sums over a micro-batch's completion tokens (scalars, float32 tensors without gradient)."""

    num_tokens: torch.Tensor
    num_clipped: torch.Tensor
    importance_weight: torch.Tensor
    num_truncated: torch.Tensor
    mismatch_kl: torch.Tensor
    """KL(behaviour || proximal), estimated by ratio - 1 - log ratio, which is never negative."""
    policy_kl: torch.Tensor
    """The same between proximal and policy: how far this step's updates have moved."""


def grpo_loss(
    policy_logprobs_BT: torch.Tensor,
    proximal_logprobs_BT: torch.Tensor,
    behaviour_logprobs_BT: torch.Tensor,
    advantages_B: torch.Tensor,
    completion_mask_BT: torch.Tensor,
    *,
    num_minibatch_tokens: int,
    objective: ObjectiveConfig,
) -> tuple[torch.Tensor, LossSums]:
    """A micro-batch's share of the minibatch's loss (a scalar with gradient), and its sums.

    Gradients flow through ``policy_logprobs_BT`` on completion tokens only.

    Raises:
        ValueError: ``num_minibatch_tokens`` is not positive.
    """
    if num_minibatch_tokens < 1:
        raise ValueError(f"num_minibatch_tokens {num_minibatch_tokens} must be at least 1")
    mask_BT = completion_mask_BT
    proximal_BT = proximal_logprobs_BT.detach()
    # Masked before exp: garbage outside the completion must not overflow to inf and 0 * inf = nan.
    log_ratio_BT = (policy_logprobs_BT - proximal_BT).masked_fill(~mask_BT, 0.0)
    log_mismatch_BT = (proximal_BT - behaviour_logprobs_BT).masked_fill(~mask_BT, 0.0)

    mismatch_BT = log_mismatch_BT.exp()
    weight_BT = mismatch_BT.clamp(max=objective.importance_cap)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    advantages_B1 = advantages_B.unsqueeze(1)
    gain_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    loss = -(weight_BT * gain_BT).masked_fill(~mask_BT, 0.0).sum() / num_minibatch_tokens

    with torch.no_grad():
        # Clipped means: the clipped branch is the smaller one, so the token has no gradient.
        is_clipped_BT = (clipped_BT * advantages_B1 < ratio_BT * advantages_B1) & mask_BT
        sums = LossSums(
            num_tokens=mask_BT.sum().float(),
            num_clipped=is_clipped_BT.sum().float(),
            importance_weight=weight_BT.masked_fill(~mask_BT, 0.0).sum(),
            num_truncated=((mismatch_BT > objective.importance_cap) & mask_BT).sum().float(),
            mismatch_kl=(mismatch_BT - 1.0 - log_mismatch_BT).sum(),
            policy_kl=(ratio_BT - 1.0 - log_ratio_BT).sum(),
        )
    return loss, sums
