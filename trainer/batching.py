"""From samples to padded micro-batches.

Shape legend: B sequences, T tokens (of the longest sequence in the micro-batch).

Everything is aligned on the token that is predicted: position ``t`` of ``completion_mask_BT``,
``behaviour_logprobs_BT`` and of the policy's logprobs belongs to ``input_ids_BT[:, t]``, whose
logits stand at ``t - 1``. A prompt of 3 and a completion of 2 tokens, padded to 6::

    input_ids        p p p c c .
    completion_mask  0 0 0 1 1 0
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.samples import TrainingSample


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Right-padded tensors of one forward and backward pass."""

    sample_indices: list[int]  # [B], into the batch the micro-batch was cut from
    input_ids_BT: torch.Tensor  # int64
    attention_mask_BT: torch.Tensor  # int64, 0 on padding
    completion_mask_BT: torch.Tensor  # bool, True on completion tokens
    behaviour_logprobs_BT: torch.Tensor  # float32, 0 outside the completion
    advantages_B: torch.Tensor  # float32

    @property
    def num_completion_tokens(self) -> int:
        return int(self.completion_mask_BT.sum())

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        return MicroBatch(
            sample_indices=self.sample_indices,
            input_ids_BT=self.input_ids_BT.to(device),
            attention_mask_BT=self.attention_mask_BT.to(device),
            completion_mask_BT=self.completion_mask_BT.to(device),
            behaviour_logprobs_BT=self.behaviour_logprobs_BT.to(device),
            advantages_B=self.advantages_B.to(device),
        )


def split_into_minibatches(num_samples: int, num_minibatches: int, seed: str) -> list[list[int]]:
    """Shuffled sample indices in near-equal parts; fewer parts when there are fewer samples."""
    order = list(range(num_samples))
    random.Random(seed).shuffle(order)
    num_parts = max(1, min(num_minibatches, num_samples))
    return [order[part::num_parts] for part in range(num_parts)]


def pack_by_token_budget(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of sequences that go together: similar lengths, padded size within the budget.

    Longest first, so that a run out of memory shows at once. With lengths ``[3, 9, 4]`` and a
    budget of 10: ``[[1], [2, 0]]`` (9 tokens, then 2 x 4). A single sequence over the budget gets a
    micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    packs: list[list[int]] = []
    for index in order:
        width = lengths[packs[-1][0]] if packs else 0
        if packs and width * (len(packs[-1]) + 1) <= token_budget:
            packs[-1].append(index)
        else:
            packs.append([index])
    return packs


def build_micro_batches(
    samples: Sequence[TrainingSample],
    indices: Sequence[int],
    *,
    token_budget: int,
    pad_token_id: int,
) -> list[MicroBatch]:
    """Micro-batches of ``samples[i] for i in indices``, longest first.

    Raises:
        ValueError: a sample's behaviour logprobs do not match its completion tokens.
    """
    lengths = [samples[index].num_tokens for index in indices]
    return [
        _pad(samples, [indices[position] for position in pack], pad_token_id)
        for pack in pack_by_token_budget(lengths, token_budget)
    ]


def _pad(samples: Sequence[TrainingSample], indices: list[int], pad_token_id: int) -> MicroBatch:
    shape = (len(indices), max(samples[index].num_tokens for index in indices))
    input_ids_BT = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
    completion_mask_BT = torch.zeros(shape, dtype=torch.bool)
    behaviour_logprobs_BT = torch.zeros(shape, dtype=torch.float32)
    for row, index in enumerate(indices):
        sample = samples[index]
        if len(sample.behaviour_logprobs) != len(sample.completion_token_ids):
            raise ValueError(
                f"{len(sample.behaviour_logprobs)} behaviour logprobs for "
                f"{len(sample.completion_token_ids)} completion tokens"
            )
        start, end = len(sample.prompt_token_ids), sample.num_tokens
        input_ids_BT[row, :end] = torch.tensor(
            sample.prompt_token_ids + sample.completion_token_ids
        )
        attention_mask_BT[row, :end] = 1
        completion_mask_BT[row, start:end] = True
        behaviour_logprobs_BT[row, start:end] = torch.tensor(sample.behaviour_logprobs)
    return MicroBatch(
        sample_indices=indices,
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        completion_mask_BT=completion_mask_BT,
        behaviour_logprobs_BT=behaviour_logprobs_BT,
        advantages_B=torch.tensor([samples[index].advantage for index in indices]),
    )
