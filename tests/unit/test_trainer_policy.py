"""Scores of tokens against a plain forward pass, gradients, and the tensors that are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shared.config.engine import ModelConfig
from shared.config.trainer import ObjectiveConfig
from shared.errors import ConfigurationError
from tests.fakes.models import make_micro_model
from trainer.batching import MicroBatch, build_micro_batches
from trainer.loss import grpo_loss
from trainer.policy import Policy, resolve_device
from trainer.samples import TrainingSample


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_model(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def policy(model_path: Path) -> Policy:
    config = ModelConfig(path=str(model_path))
    return Policy.load(model_path, config, device=torch.device("cpu"))


def sample(prompt: list[int], completion: list[int], advantage: float = 1.0) -> TrainingSample:
    return TrainingSample(
        prompt_token_ids=prompt,
        completion_token_ids=completion,
        behaviour_logprobs=[-1.0] * len(completion),
        min_weight_version=0,
        max_weight_version=0,
        advantage=advantage,
    )


SAMPLES = [sample([4, 14, 5, 17], [9, 2]), sample([6, 17], [5, 7, 11, 13, 2], -1.0)]


def batch_of(samples: list[TrainingSample]) -> MicroBatch:
    (batch,) = build_micro_batches(
        samples, range(len(samples)), token_budget=10_000, pad_token_id=0
    )
    return batch


def reference_logprobs(policy: Policy, one: TrainingSample, temperature: float) -> list[float]:
    """One sequence, no padding, no slicing."""
    ids = one.prompt_token_ids + one.completion_token_ids
    with torch.no_grad():
        logits_TV = policy.model(input_ids=torch.tensor([ids])).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV.double() / temperature, dim=-1)
    start = len(one.prompt_token_ids)
    return [float(logprobs_TV[t - 1, ids[t]]) for t in range(start, len(ids))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_pass_of_each_sequence(
    policy: Policy, temperature: float
) -> None:
    batch = batch_of(SAMPLES)
    scores = policy.score(batch, temperature)
    for row, index in enumerate(batch.sample_indices):
        found = scores.logprobs_BT[row][batch.completion_mask_BT[row]].tolist()
        expected = reference_logprobs(policy, SAMPLES[index], temperature)
        assert found == pytest.approx(expected, abs=1e-5)
    assert not scores.logprobs_BT[~batch.completion_mask_BT].any()


def test_entropy_is_that_of_the_distribution_and_has_no_gradient(policy: Policy) -> None:
    torch.nn.init.zeros_(policy.model.get_input_embeddings().weight)  # tied: all logits equal
    batch = batch_of(SAMPLES)
    entropy_BT = policy.score(batch, 1.0).entropy_BT
    assert not entropy_BT.requires_grad
    expected = torch.log(torch.tensor(float(policy.model.config.vocab_size)))
    assert torch.allclose(entropy_BT[batch.completion_mask_BT], expected)


def test_prompt_tokens_get_no_gradient_from_their_own_prediction(policy: Policy) -> None:
    batch = batch_of(SAMPLES)
    scores = policy.score(batch, 1.0)
    scores.logprobs_BT.retain_grad()
    loss, _ = grpo_loss(
        scores.logprobs_BT,
        scores.logprobs_BT.detach(),
        batch.behaviour_logprobs_BT,
        batch.advantages_B,
        batch.completion_mask_BT,
        num_minibatch_tokens=batch.num_completion_tokens,
        objective=ObjectiveConfig(),
    )
    loss.backward()
    gradient_BT = scores.logprobs_BT.grad
    assert gradient_BT is not None
    assert not gradient_BT[~batch.completion_mask_BT].any()
    assert gradient_BT[batch.completion_mask_BT].all()


def test_what_stands_in_the_padding_does_not_matter(policy: Policy) -> None:
    batch = batch_of(SAMPLES)
    before = policy.score(batch, 1.0).logprobs_BT
    batch.input_ids_BT[batch.attention_mask_BT == 0] = 21
    assert torch.allclose(before, policy.score(batch, 1.0).logprobs_BT, atol=1e-6)


def test_published_names_are_those_of_the_saved_model(policy: Policy, model_path: Path) -> None:
    with safe_open(model_path / "model.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    published = dict(policy.served_tensors())
    assert published.keys() == saved.keys()
    assert "lm_head.weight" not in published
    for name, tensor in published.items():
        assert torch.equal(tensor, saved[name])


def test_weights_are_kept_in_float32_and_published_in_the_served_dtype(model_path: Path) -> None:
    config = ModelConfig(path=str(model_path), dtype="bfloat16")
    policy = Policy.load(model_path, config, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    for _, tensor in policy.served_tensors():
        for piece_bytes in (64, 1 << 20):
            pieces = list(policy.served_pieces(tensor, piece_bytes))
            assert max(piece.nbytes for piece in pieces) <= piece_bytes
            assert torch.equal(torch.cat(pieces).view_as(tensor), tensor.bfloat16())


def test_gradient_checkpointing_gives_the_same_gradients(model_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = Policy.load(
            model_path,
            ModelConfig(path=str(model_path)),
            device=torch.device("cpu"),
            gradient_checkpointing=checkpointing,
        )
        policy.score(batch_of(SAMPLES), 1.0).logprobs_BT.sum().backward()
        gradients.append([parameter.grad for parameter in policy.model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.path"):
        Policy.load(tmp_path, ModelConfig(path=str(tmp_path)), device=torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_missing_gpu_is_a_configuration_error() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigurationError, match=r"trainer\.device"):
        resolve_device("cuda")
