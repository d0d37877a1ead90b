"""One training step on a micro model: what moves, what is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.config.engine import ModelConfig
from shared.config.trainer import OptimizerConfig, TrainerConfig
from tests.fakes.models import make_micro_model
from trainer.batching import build_micro_batches
from trainer.optimization import Optimization
from trainer.policy import Policy
from trainer.samples import TrainingSample
from trainer.update import UpdateReport, train_on


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_model(tmp_path_factory.mktemp("models") / "micro")


def load(path: Path) -> Policy:
    return Policy.load(path, ModelConfig(path=str(path)), device=torch.device("cpu"))


def on_policy_samples(policy: Policy, shift: float = 0.0, version: int = 3) -> list[TrainingSample]:
    """A good and a bad completion of one prompt, with the policy's own logprobs plus ``shift``."""
    raw = [
        TrainingSample(
            prompt_token_ids=[4, 5, 6],
            completion_token_ids=completion,
            behaviour_logprobs=[0.0] * len(completion),
            min_weight_version=version,
            max_weight_version=version,
            advantage=advantage,
        )
        for completion, advantage in (([7, 8, 2], 1.0), ([9, 10, 11, 2], -1.0))
    ]
    (batch,) = build_micro_batches(raw, [0, 1], token_budget=1000, pad_token_id=0)
    with torch.no_grad():
        logprobs_BT = policy.score(batch, 1.0).logprobs_BT
    found = {}
    for row, index in enumerate(batch.sample_indices):
        found[index] = logprobs_BT[row][batch.completion_mask_BT[row]]
    return [
        TrainingSample(
            prompt_token_ids=item.prompt_token_ids,
            completion_token_ids=item.completion_token_ids,
            behaviour_logprobs=(found[index] + shift).tolist(),
            min_weight_version=item.min_weight_version,
            max_weight_version=item.max_weight_version,
            advantage=item.advantage,
        )
        for index, item in enumerate(raw)
    ]


def update(
    policy: Policy, samples: list[TrainingSample], *, weight_version: int = 3, **options: int
) -> UpdateReport:
    config = TrainerConfig(
        optimizer=OptimizerConfig.model_validate({"learning_rate": 1e-3, **options})
    )
    return train_on(
        samples,
        policy=policy,
        optimization=Optimization(policy.model, config.optimizer),
        config=config,
        weight_version=weight_version,
        seed="0",
    )


def total_logprob(policy: Policy, sample: TrainingSample) -> float:
    (batch,) = build_micro_batches([sample], [0], token_budget=1000, pad_token_id=0)
    with torch.no_grad():
        return float(policy.score(batch, 1.0).logprobs_BT.sum())


@pytest.mark.parametrize("options", [{}, {"epochs_per_batch": 2, "minibatches_per_epoch": 2}])
def test_good_completions_become_likelier_and_bad_ones_less(
    model_path: Path, options: dict[str, int]
) -> None:
    policy = load(model_path)
    good, bad = on_policy_samples(policy)
    before = total_logprob(policy, good), total_logprob(policy, bad)
    update(policy, [good, bad], **options)
    after = total_logprob(policy, good), total_logprob(policy, bad)
    assert after[0] > before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("options", [{}, {"epochs_per_batch": 2, "minibatches_per_epoch": 2}])
def test_the_difference_to_the_engine_is_measured_before_any_update(
    model_path: Path, options: dict[str, int]
) -> None:
    policy = load(model_path)
    exact = update(policy, on_policy_samples(policy), **options)
    assert exact.max_logprob_diff == pytest.approx(0.0, abs=1e-5)
    assert exact.mismatch_kl == pytest.approx(0.0, abs=1e-6)
    shifted = update(policy, on_policy_samples(policy, shift=0.25), **options)
    assert shifted.max_logprob_diff == pytest.approx(0.25, abs=1e-5)
    assert shifted.mismatch_kl > 0.01


def test_samples_of_other_versions_are_not_compared_with_the_engine(model_path: Path) -> None:
    policy = load(model_path)
    good, bad = on_policy_samples(policy, shift=0.5)
    report = update(policy, [good, bad], weight_version=4)
    assert report.max_logprob_diff is None


def test_micro_batches_do_not_change_the_update(model_path: Path) -> None:
    policies = []
    for micro_batch_tokens in (256, 16384):
        policy = load(model_path)
        samples = on_policy_samples(policy) * 40
        update(policy, samples, micro_batch_tokens=micro_batch_tokens)
        policies.append(policy)
    for one, other in zip(*(policy.model.parameters() for policy in policies), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_updates_and_learning_rate_are_counted(model_path: Path) -> None:
    policy = load(model_path)
    samples = on_policy_samples(policy) * 3
    report = update(policy, samples, epochs_per_batch=2, minibatches_per_epoch=3)
    assert report.num_updates == 6
    assert report.learning_rate == 1e-3
    assert report.policy_kl > 0


def test_zero_samples_are_refused(model_path: Path) -> None:
    with pytest.raises(ValueError, match="zero samples"):
        update(load(model_path), [])


def sampled_by(policy: Policy, samples: list[TrainingSample]) -> list[TrainingSample]:
    """The same tokens with the logprobs that ``policy`` gives them."""
    found = []
    for sample in samples:
        (batch,) = build_micro_batches([sample], [0], token_budget=1000, pad_token_id=0)
        with torch.no_grad():
            logprobs_BT = policy.score(batch, 1.0).logprobs_BT
        logprobs = logprobs_BT[batch.completion_mask_BT].tolist()
        found.append(replace(sample, behaviour_logprobs=logprobs))
    return found


@pytest.mark.parametrize("options", [{}, {"epochs_per_batch": 1, "minibatches_per_epoch": 2}])
def test_samples_of_an_older_version_are_weighed_by_what_has_changed_since(
    model_path: Path, options: dict[str, int]
) -> None:
    """Truncated importance sampling between the weights that sampled and those that are trained."""
    older, policy = load(model_path), load(model_path)
    for _ in range(30):
        update(policy, on_policy_samples(policy))
    samples = sampled_by(older, on_policy_samples(policy))
    now = sampled_by(policy, samples)
    ratios = [
        math.exp(new - old)
        for sample, same in zip(samples, now, strict=True)
        for old, new in zip(sample.behaviour_logprobs, same.behaviour_logprobs, strict=True)
    ]
    cap = TrainerConfig().objective.importance_cap
    assert min(ratios) < 0.9, "the versions differ"
    assert max(ratios) > cap, "and truncation matters"
    report = update(policy, samples, weight_version=9, **options)
    expected = sum(min(ratio, cap) for ratio in ratios) / len(ratios)
    assert report.importance_weight == pytest.approx(expected, rel=1e-4)
    assert report.truncated_fraction == sum(ratio > cap for ratio in ratios) / len(ratios)
