"""int4 round-to-nearest straight into the block layout of vLLM's int4 W4A8 CPU kernel, in one pass.

Compiled by Numba, which vLLM requires as well: one pass over the weight, on all of torch's threads,
where torch operations would make ten. Codes and scales equal ``schemes.quantize_int4_groups`` to
the last bit.

One block is 32 output channels by one group of G input channels. Its bytes, in order::

    for four input channels k..k+3 (G / 4 times):
        for half in 0, 1:  for j in 0..7:  for k in k..k+3:
            one byte: low four bits code[16 half + j, k], high ones code[16 half + 8 + j, k]
    then 32 int32: the sum over the group of (code - zero), per output channel

Legend: N output channels, K input channels, G group size, g groups (K / G), B blocks (N / 32).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

CHANNELS_PER_BLOCK = 32
SUM_BYTES = CHANNELS_PER_BLOCK * 4
ROUNDING_CONSTANT = np.float32(12582912.0)
"""1.5 * 2**23: added to a small float32 it leaves no fraction bits, so the sum is rounded to the
nearest integer (ties to even), which can then be read off the lowest bits."""
LARGEST_CODE = np.float32(15.0)
SYMMETRIC_LEVELS = np.float32(7.5)


def block_bytes(group_size: int) -> int:
    """Bytes of one block: two codes a byte, then the sums."""
    return CHANNELS_PER_BLOCK * group_size // 2 + SUM_BYTES


def quantize_int4_into_blocks(
    weight_NK: torch.Tensor,
    blocks_BgX: torch.Tensor,
    zeros_Bg32: torch.Tensor,
    scales_Bg32: torch.Tensor,
    *,
    symmetric: bool,
) -> None:
    """Quantize a CPU weight into tensors that exist already.

    Args:
        weight_NK: bfloat16 or float32 [N, K].
        blocks_BgX: uint8 [N / 32, g, ``block_bytes(G)``], contiguous; written.
        zeros_Bg32: int8 [N / 32, g, 32], contiguous; written with the zero codes.
        scales_Bg32: float32 [N / 32, g, 32], contiguous; written.

    Raises:
        ValueError: N is no multiple of 32, K none of G, or another dtype.
    """
    num_rows, num_columns = weight_NK.shape
    num_groups = scales_Bg32.shape[1]
    if num_rows % CHANNELS_PER_BLOCK or num_columns % (4 * num_groups):
        raise ValueError(
            f"int4 blocks need output channels in blocks of {CHANNELS_PER_BLOCK} and whole groups, "
            f"got {num_rows} x {num_columns} in {num_groups} groups"
        )
    if weight_NK.dtype is torch.bfloat16:
        bits_NK, shift = weight_NK.contiguous().view(torch.uint16).numpy(), 16
    elif weight_NK.dtype is torch.float32:
        bits_NK, shift = weight_NK.contiguous().view(torch.uint32).numpy(), 0
    else:
        raise ValueError(f"int4 blocks are made from bfloat16 or float32, not {weight_NK.dtype}")
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    _quantize_blocks(
        bits_NK,
        shift,
        blocks_BgX.numpy(),
        zeros_Bg32.numpy(),
        scales_Bg32.numpy(),
        symmetric,
    )


# Without NaNs and signed zeros minima can be vectorized; the arithmetic itself stays as written.
@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"nnan", "nsz"})  # type: ignore[untyped-decorator]
def _quantize_blocks(
    bits_NK: Any, shift: Any, blocks_BgX: Any, zeros_Bg32: Any, scales_Bg32: Any, symmetric: Any
) -> None:
    num_groups = scales_Bg32.shape[1]
    size = bits_NK.shape[1] // num_groups
    wide = np.uint32(shift)
    for block in numba.prange(blocks_BgX.shape[0]):
        # A group of one row, as float32 and as its bits; small enough for the first-level cache.
        values = np.empty(size, np.float32)
        value_bits = values.view(np.uint32)
        rounded = np.empty(size, np.float32)
        rounded_bits = rounded.view(np.uint32)
        # The codes of a block, one byte each, four input channels to a word: [k / 4, 32] words.
        codes = np.empty((32, size), np.uint8)
        code_words = codes.view(np.uint32)
        for group in range(num_groups):
            start = group * size
            sums = blocks_BgX[block, group, size * 16 :].view(np.int32)
            for channel in range(32):
                row = block * 32 + channel
                for k in range(size):
                    value_bits[k] = np.uint32(bits_NK[row, start + k]) << wide
                low = np.float32(0.0)
                high = np.float32(0.0)
                for k in range(size):
                    low = min(low, values[k])
                    high = max(high, values[k])
                if symmetric:
                    span = np.float32(max(high, -low) / SYMMETRIC_LEVELS)
                else:
                    span = np.float32((high - low) / LARGEST_CODE)
                scale = span if span > 0 else np.float32(1.0)
                inverse = np.float32(np.float32(1.0) / scale)
                zero = np.float32(8.0)
                if not symmetric:
                    zero = np.float32(np.rint(-low * inverse))
                zeros_Bg32[block, group, channel] = np.int8(zero)
                scales_Bg32[block, group, channel] = scale
                smallest = np.float32(-zero)
                largest = np.float32(LARGEST_CODE - zero)
                for k in range(size):
                    level = np.float32(values[k] * inverse)
                    level = min(max(level, smallest), largest)
                    rounded[k] = np.float32(level + ROUNDING_CONSTANT)
                code_offset = np.uint32(zero)
                total = np.int32(0)
                for k in range(size):
                    code = np.uint32((rounded_bits[k] + code_offset) & np.uint32(15))
                    codes[channel, k] = np.uint8(code)
                    total += np.int32(code)
                sums[channel] = total - np.int32(zero) * np.int32(size)
            words = blocks_BgX[block, group, : size * 16].view(np.uint32)
            for four in range(size // 4):
                for j in range(8):
                    words[four * 16 + j] = code_words[j, four] | (
                        code_words[8 + j, four] << np.uint32(4)
                    )
                    words[four * 16 + 8 + j] = code_words[16 + j, four] | (
                        code_words[24 + j, four] << np.uint32(4)
                    )
