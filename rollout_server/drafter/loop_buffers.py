"""Buffers that a captured draft loop reads and writes, at addresses that never change.

Legend: B rows of the batch (padding included), K draft steps, V vocabulary, C columns of the block
table. Pure torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout_server.drafter.cuda_graphs import LoopShape

PADDING_SLOT = -1
"""vLLM's attention kernels write nothing to this slot (``PADDING_SLOT_ID``)."""
SAMPLING_EPSILON = 1e-5
"""Temperatures below are greedy, as in vLLM's sampler (``_SAMPLING_EPS``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTables:
    """Where each step of a loop reads and writes; row k belongs to step k."""

    positions_KB: torch.Tensor  # int64
    seq_lens_KB: torch.Tensor  # int32, the token of the step included
    slots_KB: torch.Tensor  # int64, PADDING_SLOT where nothing may be written


class LoopBuffers:
    """Inputs and outputs of captured loops, for batches of up to ``max_batch_size``."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_draft_length: int,
        num_block_columns: int,
        block_size: int,
        max_model_len: int,
        probabilities: torch.Tensor,
    ) -> None:
        """
        Args:
            probabilities: float32 of at least B * K * V elements, flat; given, because it is large
                enough to have to exist while vLLM measures memory.
        """
        device = probabilities.device
        self.block_size = block_size
        self.max_model_len = max_model_len
        self._rows_B = torch.arange(max_batch_size, device=device)
        self._steps_K = torch.arange(max_draft_length, device=device)
        self._num_active = torch.zeros(1, dtype=torch.int64, device=device)
        self._seq_lens_B = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self._block_table_BC = torch.zeros(
            max_batch_size, num_block_columns, dtype=torch.int32, device=device
        )
        self.first_token_ids_B = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self._temperature_B = torch.zeros(max_batch_size, dtype=torch.float32, device=device)
        self._draft_token_ids = torch.zeros(
            max_batch_size * max_draft_length, dtype=torch.int64, device=device
        )
        self._probabilities = probabilities

    def load(
        self,
        *,
        next_token_ids_B: torch.Tensor,
        seq_lens_B: torch.Tensor,
        num_rejected_B: torch.Tensor | None,
        block_table_BC: torch.Tensor,
        temperature_B: torch.Tensor | None,
    ) -> None:
        """Put a batch in place. Everything stays on the device; rows beyond it become padding.

        Args:
            seq_lens_B: tokens in the cache, rejected drafts still counted.
            temperature_B: None when every row is greedy.
        """
        num_rows = next_token_ids_B.shape[0]
        self._num_active.fill_(num_rows)
        self.first_token_ids_B[:num_rows].copy_(next_token_ids_B)
        seq_lens = self._seq_lens_B[:num_rows]
        seq_lens.copy_(seq_lens_B[:num_rows])
        if num_rejected_B is not None:
            seq_lens.sub_(num_rejected_B[:num_rows])
        num_columns = min(block_table_BC.shape[1], self._block_table_BC.shape[1])
        self._block_table_BC[:num_rows, :num_columns].copy_(block_table_BC[:num_rows, :num_columns])
        if temperature_B is None:
            self._temperature_B.zero_()
        else:
            self._temperature_B[:num_rows].copy_(temperature_B[:num_rows])

    def block_table(self, shape: LoopShape) -> torch.Tensor:
        """int32 [B, C]."""
        return self._block_table_BC[: shape.batch_size]

    def temperature(self, shape: LoopShape) -> torch.Tensor:
        """float32 [B]."""
        return self._temperature_B[: shape.batch_size]

    def draft_token_ids(self, shape: LoopShape) -> torch.Tensor:
        """int64 [B, K], contiguous: where the loop leaves its drafts."""
        size = shape.batch_size * shape.draft_length
        return self._draft_token_ids[:size].view(shape.batch_size, shape.draft_length)

    def probabilities(self, shape: LoopShape, vocab_size: int) -> torch.Tensor:
        """float32 [K, B, V], contiguous: the distribution each draft was drawn from."""
        size = shape.batch_size * shape.draft_length * vocab_size
        return self._probabilities[:size].view(shape.draft_length, shape.batch_size, vocab_size)

    def step_tables(self, shape: LoopShape) -> StepTables:
        """All steps' tables at once; captured at the head of the loop.

        The token of step k stands at position ``length + k``. Padding rows, and positions past
        ``max_model_len``, write nothing and attend to one token.
        """
        size, length = shape.batch_size, shape.draft_length
        positions_KB = self._seq_lens_B[:size].to(torch.int64) + self._steps_K[:length, None]
        usable_KB = (self._rows_B[:size] < self._num_active) & (positions_KB < self.max_model_len)
        positions_KB = torch.where(usable_KB, positions_KB, 0)
        columns_KB = (positions_KB // self.block_size).clamp_(max=self._block_table_BC.shape[1] - 1)
        blocks_KB = self._block_table_BC[self._rows_B[:size], columns_KB].to(torch.int64)
        slots_KB = blocks_KB * self.block_size + positions_KB % self.block_size
        return StepTables(
            positions_KB=positions_KB,
            seq_lens_KB=torch.where(usable_KB, positions_KB + 1, 1).to(torch.int32),
            slots_KB=torch.where(usable_KB, slots_KB, PADDING_SLOT),
        )


def sample_drafts(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, probabilities_BV: torch.Tensor
) -> torch.Tensor:
    """Draw one token per row, with the device's default generator and no wait for the device.

    The Gumbel-max trick, as ``noise.py`` draws on CUDA; a greedy row takes the likeliest token.

    Args:
        probabilities_BV: float32, contiguous; receives the distribution drawn from.

    Returns:
        int64 [B].
    """
    is_greedy_B = temperature_B < SAMPLING_EPSILON
    divisor_B1 = torch.where(is_greedy_B, 1.0, temperature_B)[:, None]
    scaled_BV = logits_BV.to(torch.float32) / divisor_B1
    torch.softmax(scaled_BV, dim=-1, out=probabilities_BV)
    likeliest_B = scaled_BV.argmax(dim=-1)
    noise_BV = torch.empty_like(scaled_BV).exponential_()
    return torch.where(is_greedy_B, likeliest_B, scaled_BV.sub_(noise_BV.log_()).argmax(dim=-1))
