"""Padding, masks and packing."""

from __future__ import annotations

import pytest
import torch

from trainer.batching import build_micro_batches, pack_by_token_budget, split_into_minibatches
from trainer.samples import TrainingSample


def sample(num_prompt: int, num_completion: int, advantage: float = 1.0) -> TrainingSample:
    return TrainingSample(
        prompt_token_ids=list(range(10, 10 + num_prompt)),
        completion_token_ids=list(range(50, 50 + num_completion)),
        behaviour_logprobs=[-0.1 * (index + 1) for index in range(num_completion)],
        min_weight_version=0,
        max_weight_version=0,
        advantage=advantage,
    )


def test_masks_are_right_to_the_token() -> None:
    samples = [sample(3, 2, 0.5), sample(1, 5, -2.0)]
    (batch,) = build_micro_batches(samples, [0, 1], token_budget=100, pad_token_id=0)
    assert batch.sample_indices == [1, 0]  # longest first
    assert batch.input_ids_BT.tolist() == [[10, 50, 51, 52, 53, 54], [10, 11, 12, 50, 51, 0]]
    assert batch.attention_mask_BT.tolist() == [[1] * 6, [1, 1, 1, 1, 1, 0]]
    assert batch.completion_mask_BT.int().tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    behaviour = torch.tensor([[0, -0.1, -0.2, -0.3, -0.4, -0.5], [0, 0, 0, -0.1, -0.2, 0]])
    assert torch.allclose(batch.behaviour_logprobs_BT, behaviour)
    assert batch.advantages_B.tolist() == [-2.0, 0.5]
    assert batch.num_completion_tokens == 7


def test_logprobs_that_do_not_match_the_tokens_are_refused() -> None:
    broken = TrainingSample(
        prompt_token_ids=[1],
        completion_token_ids=[2, 3],
        behaviour_logprobs=[-1.0],
        min_weight_version=0,
        max_weight_version=0,
        advantage=0.0,
    )
    with pytest.raises(ValueError, match="1 behaviour logprobs for 2"):
        build_micro_batches([broken], [0], token_budget=100, pad_token_id=0)


def test_packs_hold_every_sequence_once_within_the_budget() -> None:
    lengths = [7, 30, 3, 12, 12, 5, 29, 1]
    packs = pack_by_token_budget(lengths, 36)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert max(lengths[index] for index in pack) * len(pack) <= 36
    widths = [lengths[pack[0]] for pack in packs]
    assert widths == sorted(widths, reverse=True)


def test_a_sequence_over_the_budget_goes_alone() -> None:
    assert pack_by_token_budget([3, 50, 4], 10) == [[1], [2, 0]]


def test_minibatches_partition_the_batch_and_depend_on_the_seed() -> None:
    parts = split_into_minibatches(10, 3, "a")
    assert sorted(index for part in parts for index in part) == list(range(10))
    assert {len(part) for part in parts} == {3, 4}
    assert parts == split_into_minibatches(10, 3, "a")
    assert parts != split_into_minibatches(10, 3, "b")


def test_there_are_no_empty_minibatches() -> None:
    assert [len(part) for part in split_into_minibatches(2, 5, "a")] == [1, 1]
