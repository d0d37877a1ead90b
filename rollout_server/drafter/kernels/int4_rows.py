"""vLLM's int4 W4A8 CPU multiplication over blocks whose rows are requantized in place.

``int4_vnni.py`` describes the kernel and packs it from an ``Int4Weight``; here a compiled quantizer
writes the same blocks directly (a test compares the two bit for bit). Leans on vLLM as that file.
"""

from __future__ import annotations

import torch

from rollout_server.drafter.kernels.base import LayerShape
from rollout_server.drafter.kernels.int4_vnni import (
    BLOCK_OUTPUTS,
    VnniInt4Matmul,
    VnniInt4Weight,
)


class Int4RowsMatmul(VnniInt4Matmul):
    """int4 weights in blocks of 32 rows; rows may be replaced at any time."""

    row_multiple = BLOCK_OUTPUTS

    def __init__(self, shape: LayerShape, *, group_size: int, symmetric: bool) -> None:
        super().__init__(shape, group_size=group_size)
        self._symmetric = symmetric
        sizes = (shape.num_outputs // BLOCK_OUTPUTS, shape.num_inputs // group_size)
        # Made outside inference mode, so that a push may write them in any mode.
        with torch.inference_mode(False):
            self._buffers = VnniInt4Weight(
                blocks=torch.empty(*sizes, group_size * 16 + 128, dtype=torch.uint8, device="cpu"),
                zeros=torch.empty(*sizes, BLOCK_OUTPUTS, dtype=torch.int8, device="cpu"),
                scales=torch.empty(*sizes, BLOCK_OUTPUTS, dtype=torch.float32, device="cpu"),
            )
        self._weight = self._buffers

    def pack_rows(self, weight_RK: torch.Tensor, first_row: int) -> None:
        """Quantize ``weight_RK`` into the rows from ``first_row`` on, both multiples of 32."""
        # Imported where it is used: as a vLLM worker starts, vLLM looks through every loaded module
        # for kernels to replace, and trips over an object in Numba's LLVM binding.
        from rollout_server.drafter.int4_blocks import quantize_int4_into_blocks

        first_block = first_row // BLOCK_OUTPUTS
        blocks = slice(first_block, first_block + weight_RK.shape[0] // BLOCK_OUTPUTS)
        quantize_int4_into_blocks(
            weight_RK,
            self._buffers.blocks[blocks],
            self._buffers.zeros[blocks],
            self._buffers.scales[blocks],
            symmetric=self._symmetric,
        )
