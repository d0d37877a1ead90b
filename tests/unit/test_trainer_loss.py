"""The objective against hand-computed numbers and a reference that goes token by token."""

from __future__ import annotations

import math

import pytest
import torch

from shared.config.trainer import ObjectiveConfig
from trainer.loss import LossSums, grpo_loss

OBJECTIVE = ObjectiveConfig(clip_low=0.2, clip_high=0.3, importance_cap=2.0)


def one_token(
    policy: float, proximal: float, behaviour: float, advantage: float
) -> tuple[float, float, LossSums]:
    """Loss, gradient by the policy's logprob and sums of a single completion token."""
    logprobs_BT = torch.tensor([[0.0, policy]], requires_grad=True)
    loss, sums = grpo_loss(
        logprobs_BT,
        torch.tensor([[0.0, proximal]]),
        torch.tensor([[0.0, behaviour]]),
        torch.tensor([advantage]),
        torch.tensor([[False, True]]),
        num_minibatch_tokens=1,
        objective=OBJECTIVE,
    )
    loss.backward()
    assert logprobs_BT.grad is not None
    return float(loss.detach()), float(logprobs_BT.grad[0, 1]), sums


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected_loss", "expected_gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # clipped at 1 + clip_high: no push further up
        (0.5, 2.0, -1.0, -1.0),  # below the clip, but a good token may come back
        (0.5, -2.0, 1.6, 0.0),  # clipped at 1 - clip_low: no push further down
        (1.5, -2.0, 3.0, 3.0),  # above the clip, but a bad token may come back
    ],
)
def test_clipping_token_by_token(
    ratio: float, advantage: float, expected_loss: float, expected_gradient: float
) -> None:
    proximal = -1.0
    loss, gradient, sums = one_token(proximal + math.log(ratio), proximal, proximal, advantage)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradient == pytest.approx(expected_gradient, rel=1e-5, abs=1e-7)
    assert float(sums.num_clipped) == (1.0 if expected_gradient == 0.0 else 0.0)


def test_the_importance_weight_multiplies_and_is_truncated() -> None:
    halved, _, _ = one_token(-1.0, -1.0, -1.0 - math.log(0.5), 1.0)
    assert halved == pytest.approx(-0.5, rel=1e-5)
    capped, gradient, sums = one_token(-1.0, -1.0, -1.0 - math.log(7.0), 1.0)
    assert capped == pytest.approx(-2.0, rel=1e-5)
    assert gradient == pytest.approx(-2.0, rel=1e-5)
    assert float(sums.num_truncated) == 1.0
    # KL estimate: 7 - 1 - ln 7.
    assert float(sums.mismatch_kl) == pytest.approx(6.0 - math.log(7.0), rel=1e-5)


def reference_loss(
    policy: list[list[float]],
    proximal: list[list[float]],
    behaviour: list[list[float]],
    advantages: list[float],
    mask: list[list[bool]],
) -> float:
    total, num_tokens = 0.0, 0
    for row, advantage in enumerate(advantages):
        for t, counts in enumerate(mask[row]):
            if not counts:
                continue
            num_tokens += 1
            weight = min(math.exp(proximal[row][t] - behaviour[row][t]), OBJECTIVE.importance_cap)
            ratio = math.exp(policy[row][t] - proximal[row][t])
            low, high = 1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high
            clipped = min(max(ratio, low), high)
            total -= weight * min(ratio * advantage, clipped * advantage)
    return total / num_tokens


def random_batch(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 9)
    policy, proximal, behaviour = (-3 * torch.rand(shape, generator=generator) for _ in range(3))
    advantages = torch.randn(5, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    return policy, proximal, behaviour, advantages, mask


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_equals_the_reference(seed: int) -> None:
    policy, proximal, behaviour, advantages, mask = random_batch(seed)
    loss, _ = grpo_loss(
        policy, proximal, behaviour, advantages, mask,
        num_minibatch_tokens=int(mask.sum()), objective=OBJECTIVE,
    )  # fmt: skip
    expected = reference_loss(
        policy.tolist(), proximal.tolist(), behaviour.tolist(), advantages.tolist(), mask.tolist()
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_cutting_a_minibatch_into_micro_batches_changes_nothing() -> None:
    policy, proximal, behaviour, advantages, mask = random_batch(7)
    num_tokens = int(mask.sum())

    def run(rows: slice) -> torch.Tensor:
        loss, _ = grpo_loss(
            policy[rows], proximal[rows], behaviour[rows], advantages[rows], mask[rows],
            num_minibatch_tokens=num_tokens, objective=OBJECTIVE,
        )  # fmt: skip
        return loss

    assert float(run(slice(0, 2)) + run(slice(2, 5))) == pytest.approx(float(run(slice(0, 5))))


def test_only_completion_tokens_get_gradient_even_beside_infinities() -> None:
    policy, proximal, behaviour, advantages, mask = random_batch(1)
    proximal = proximal.masked_fill(~mask, -math.inf)
    behaviour = behaviour.masked_fill(~mask, 200.0)
    policy.requires_grad_()
    loss, _ = grpo_loss(
        policy, proximal, behaviour, advantages, mask,
        num_minibatch_tokens=int(mask.sum()), objective=OBJECTIVE,
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()
    assert not policy.grad[~mask].any()
    assert policy.grad[mask].any()


def test_a_minibatch_without_tokens_is_refused() -> None:
    policy, proximal, behaviour, advantages, mask = random_batch(1)
    with pytest.raises(ValueError, match="num_minibatch_tokens 0"):
        grpo_loss(
            policy, proximal, behaviour, advantages, mask & False,
            num_minibatch_tokens=0, objective=OBJECTIVE,
        )  # fmt: skip
