"""Saving, finding, pruning, and going on exactly where a run was."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest
import torch

from shared.config.engine import ModelConfig
from shared.config.trainer import OptimizerConfig, TrainerConfig
from shared.errors import ConfigurationError, SlipstreamError
from tests.fakes.models import make_micro_model
from trainer.checkpoint import CheckpointStore, TrainerState, restore
from trainer.optimization import Optimization, learning_rate_at
from trainer.policy import Policy
from trainer.samples import TrainingSample
from trainer.update import UpdateReport, train_on

CONFIG = TrainerConfig(
    optimizer=OptimizerConfig(
        learning_rate=1e-3, warmup_steps=6, epochs_per_batch=2, minibatches_per_epoch=2
    )
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_model(tmp_path_factory.mktemp("models") / "micro")


def load(path: Path) -> tuple[Policy, Optimization]:
    policy = Policy.load(path, ModelConfig(path=str(path)), device=torch.device("cpu"))
    return policy, Optimization(policy.model, CONFIG.optimizer)


def samples_of(step: int) -> list[TrainingSample]:
    rng = random.Random(step)
    samples = []
    for _ in range(6):
        length = rng.randint(2, 7)
        samples.append(
            TrainingSample(
                prompt_token_ids=[rng.randint(4, 20) for _ in range(3)],
                completion_token_ids=[rng.randint(4, 20) for _ in range(length)],
                behaviour_logprobs=[-3.0 + rng.random() for _ in range(length)],
                min_weight_version=step,
                max_weight_version=step,
                advantage=rng.uniform(-1, 1),
            )
        )
    return samples


def train(policy: Policy, optimization: Optimization, step: int) -> UpdateReport:
    return train_on(
        samples_of(step),
        policy=policy,
        optimization=optimization,
        config=CONFIG,
        weight_version=step,
        seed=str(step),
    )


def figures(report: UpdateReport) -> tuple[float, ...]:
    """What must repeat exactly; the wall times need not."""
    return report.loss, report.grad_norm, report.learning_rate, report.entropy, report.policy_kl


def state(step: int) -> TrainerState:
    return TrainerState(step=step, weight_version=step + 1, num_updates=4 * step, seed=0)


def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, model_path: Path
) -> None:
    policy, optimization = load(model_path)
    for step in range(2):
        train(policy, optimization, step)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(state(2), policy, optimization, tokenizer=None)
    uninterrupted = [figures(train(policy, optimization, step)) for step in range(2, 5)]

    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.state == state(2)
    resumed_policy, resumed_optimization = load(checkpoint.path)
    restore(checkpoint, resumed_optimization)
    resumed = [figures(train(resumed_policy, resumed_optimization, step)) for step in range(2, 5)]
    assert resumed == uninterrupted
    for one, other in zip(
        policy.model.parameters(), resumed_policy.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_random_numbers_go_on_where_they_were(tmp_path: Path, model_path: Path) -> None:
    policy, optimization = load(model_path)
    store = CheckpointStore(tmp_path, keep=1)
    with torch.random.fork_rng():
        store.save(state(0), policy, optimization, tokenizer=None)
        expected = torch.rand(3)
        torch.manual_seed(77)
        checkpoint = store.latest()
        assert checkpoint is not None
        restore(checkpoint, optimization)
        assert torch.equal(torch.rand(3), expected)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, model_path: Path) -> None:
    policy, optimization = load(model_path)
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / ".partial-step-000001-99").mkdir()
    for step in (1, 2, 10):
        store.save(state(step), policy, optimization, tokenizer=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.state.step == 10


def test_a_step_saved_twice_is_the_later_one(tmp_path: Path, model_path: Path) -> None:
    policy, optimization = load(model_path)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(state(1), policy, optimization, tokenizer=None)
    later = state(1).model_copy(update={"weight_version": 9})
    store.save(later, policy, optimization, tokenizer=None)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.state == later


@pytest.mark.parametrize("num_renames", [0, 1])
def test_a_step_that_cannot_be_saved_again_keeps_its_checkpoint(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int
) -> None:
    policy, optimization = load(model_path)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(state(1), policy, optimization, tokenizer=None)
    replace, calls = os.replace, itertools.count()

    def failing(source: Path, target: Path) -> None:
        if next(calls) == num_renames:
            raise OSError("disk error")
        replace(source, target)

    monkeypatch.setattr("trainer.checkpoint.os.replace", failing)
    with pytest.raises(SlipstreamError, match="disk error"):
        store.save(state(1), policy, optimization, tokenizer=None)
    checkpoint = store.latest()
    assert checkpoint is not None
    restore(checkpoint, optimization)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).latest() is None


def test_a_checkpoint_without_readable_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-000003").mkdir()
    with pytest.raises(ConfigurationError, match="step-000003"):
        CheckpointStore(tmp_path, keep=1).latest()


def test_optimizer_state_of_another_model_is_refused(model_path: Path) -> None:
    _, optimization = load(model_path)
    with pytest.raises(SlipstreamError, match="no model parameter"):
        optimization.load_state_tensors({"model.other.weight/exp_avg": torch.zeros(2)}, 1)


def test_an_infinite_gradient_leaves_the_weights_alone(model_path: Path) -> None:
    policy, optimization = load(model_path)
    before = [parameter.clone() for parameter in policy.model.parameters()]
    next(iter(policy.model.parameters())).grad = torch.full_like(before[0], float("inf"))
    with pytest.raises(SlipstreamError, match="gradient norm is"):
        optimization.step()
    for parameter, saved in zip(policy.model.parameters(), before, strict=True):
        assert torch.equal(parameter, saved)


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate_at(0, OptimizerConfig(learning_rate=0.5)) == 0.5
