"""Padded batches of sums with their answers, for the warm start. Shapes: B sequences, T tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from trainer.tasks.arithmetic import ArithmeticTask

BATCH_SIZE = 32
BATCHES_PER_POOL = 8
IGNORED_LABEL = -100


class ExampleBatches:
    """Batches without end; worked ones are of similar length (a pool is sorted and cut)."""

    def __init__(self, task: ArithmeticTask, tokenizer: Any, seed: int) -> None:
        self.direct_fraction = 0.0
        self._stream = task.training_stream(seed)
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._batches: list[list[tuple[list[int], list[int]]]] = []

    def mix_in_direct(self, fraction: float) -> None:
        """From the next batch on, this fraction of the answers comes without work."""
        self.direct_fraction = fraction
        self._batches.clear()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input ids, labels and attention mask; only answers (and the end) carry loss."""
        if not self._batches:
            self._refill()
        return _pad(self._batches.pop(), self._tokenizer)

    def _refill(self) -> None:
        pool = []
        for item in islice(self._stream, BATCH_SIZE * BATCHES_PER_POOL):
            is_direct = self._rng.random() < self.direct_fraction
            answer = item.direct_answer if is_direct else item.worked_answer
            pool.append((self._tokenizer.encode(item.prompt), self._tokenizer.encode(answer)))
        if self.direct_fraction == 0.0:
            pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        # Mixed, a sort by length would sort by kind, and every batch pull the other way.
        starts = list(range(0, len(pool), BATCH_SIZE))
        self._rng.shuffle(starts)
        self._batches = [pool[start : start + BATCH_SIZE] for start in starts]


def _pad(
    pairs: Sequence[tuple[list[int], list[int]]], tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
    input_ids_BT = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(pairs), width), IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(pairs):
        completion = torch.tensor([*answer, tokenizer.eos_token_id])
        end = len(prompt) + len(completion)
        input_ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        input_ids_BT[row, len(prompt) : end] = completion
        labels_BT[row, len(prompt) : end] = completion
    return input_ids_BT, labels_BT, (input_ids_BT != tokenizer.pad_token_id).long()
