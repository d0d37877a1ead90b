"""int4 round-to-nearest straight into the blocks of the CPU's int4 kernel, in one pass.

The layout is described in ``kernels/int4_vnni.py``, which makes it the plain way. Compiled by
Numba, which vLLM requires as well: one pass over the weight, on as many threads as torch has, where
torch operations make ten. Codes, sums, zero codes and scales equal the plain way's to the last bit.

The threads are ours. Numba's own would set the number of OpenMP threads of the process to the cores
its caller is bound to, which in a vLLM worker is one, and so halve the speed of the target.

Legend: N output channels, K input channels, G group size, g groups (K / G).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import cycle, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch

BLOCK_OUTPUTS = 32
ROUNDING_CONSTANT = np.float32(12582912.0)
"""1.5 * 2**23: added to a small float32 it leaves no fraction bits, so the sum is rounded to the
nearest integer (ties to even), which can then be read off the lowest bits."""
PADDING_BYTES = 64
SIGN_BIT = np.uint32(0x80000000)
LARGEST_CODE = np.float32(15.0)
SYMMETRIC_LEVELS = np.float32(7.5)


def quantize_int4_into_blocks(
    weight_NK: torch.Tensor,
    blocks: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    *,
    symmetric: bool,
) -> None:
    """Quantize a CPU weight into tensors that exist already.

    Args:
        weight_NK: floating point [N, K].
        blocks: uint8 [N / 32, g, G * 16 + 128], contiguous; written.
        zeros: int8 [N / 32, g, 32], contiguous; written.
        scales: float32 [N / 32, g, 32], contiguous; written.

    Raises:
        ValueError: the tensors' sizes do not go together.
    """
    num_rows, num_columns = weight_NK.shape
    num_blocks, num_groups, _ = scales.shape
    group_size = num_columns // num_groups
    expected = (num_blocks, num_groups, group_size * 16 + 128)
    if (
        (num_rows, num_columns) != (num_blocks * BLOCK_OUTPUTS, num_groups * group_size)
        or blocks.shape != expected
        or group_size % 4
    ):
        raise ValueError(
            f"an int4 layer of {num_rows} x {num_columns} does not fit blocks of shape "
            f"{tuple(blocks.shape)}"
        )
    if weight_NK.dtype is torch.bfloat16:
        bits_NK, shift = weight_NK.contiguous().view(torch.uint16).numpy(), 16
    else:
        bits_NK, shift = weight_NK.to(torch.float32).contiguous().view(torch.uint32).numpy(), 0
    words = blocks.view(torch.int32).view(torch.uint32).numpy()
    arrays = (bits_NK, shift, words, zeros.numpy(), scales.numpy(), symmetric)
    num_threads = torch.get_num_threads()
    bounds = [num_blocks * part // num_threads for part in range(num_threads + 1)]
    parts = [
        _threads(num_threads).submit(_quantize_blocks, first, stop, *arrays)
        for first, stop in pairwise(bounds)
        if first < stop
    ]
    for part in parts:
        part.result()


@lru_cache(maxsize=1)
def _threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads on the cores that this process's computing threads are bound to, one each."""
    cores = cycle(_bound_cores() or [None])
    lock = Lock()

    def bind() -> None:
        with lock:
            core = next(cores)
        if core is not None:
            os.sched_setaffinity(0, {core})

    return ThreadPoolExecutor(num_threads, "int4-quantizer", initializer=bind)


def _bound_cores() -> list[int]:
    """Cores to which single threads of this process are bound, as vLLM binds its OpenMP threads."""
    bound: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        try:
            cores = os.sched_getaffinity(int(thread.name))
        except OSError:  # it has ended
            continue
        if len(cores) == 1:
            bound |= cores
    return sorted(bound)


# Without NaNs and signed zeros the clamping can be vectorized; the arithmetic stays as written.
@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _quantize_blocks(
    first_block: Any,
    stop_block: Any,
    bits_NK: Any,
    shift: Any,
    words: Any,
    zeros: Any,
    scales: Any,
    symmetric: Any,
) -> None:
    num_groups = scales.shape[1]
    num_columns = bits_NK.shape[1]
    size = num_columns // num_groups
    num_fours = size // 4
    wide = np.uint32(shift)
    for block in range(first_block, stop_block):
        # A group of one row, as float32 and as its bits; small enough for the first-level cache.
        values = np.empty(size, np.float32)
        value_bits = values.view(np.uint32)
        rounded = np.empty(size, np.float32)
        extremes = np.empty(2, np.float32)
        extreme_bits = extremes.view(np.uint32)
        rounded_bits = rounded.view(np.uint32)
        # Two rows share a byte. Row 16 half + 8 high + j is in pair 8 half + j. The padding keeps
        # the same column of different pairs out of the same cache set.
        pairs = np.empty((16, num_columns + PADDING_BYTES), np.uint8)
        pair_words = pairs.view(np.uint32)  # four input channels each
        # Row after row, so that the weight is read as a stream: group after group, it would be
        # 256 bytes from each of 32 pages, which no prefetcher follows (three times slower).
        for lane in range(32):
            row = block * 32 + lane
            pair = 8 * (lane // 16) + lane % 8
            for group in range(num_groups):
                start = group * size
                bits = bits_NK[row, start : start + size]
                # Bits of positive floats are in the order of signed integers, those of negative
                # ones in reverse order of unsigned integers, above all others. Integer maxima are
                # vectorized, float ones are not.
                highest = np.int32(0)
                lowest = np.uint32(0)
                for k in range(size):
                    value = np.uint32(np.uint32(bits[k]) << wide)
                    value_bits[k] = value
                    highest = max(highest, np.int32(value))
                    lowest = max(lowest, value)
                extreme_bits[0] = np.uint32(highest)
                extreme_bits[1] = lowest if lowest >= SIGN_BIT else np.uint32(0)
                high = extremes[0]
                low = extremes[1]
                if symmetric:
                    span = np.float32(max(high, -low) / SYMMETRIC_LEVELS)
                else:
                    span = np.float32((high - low) / LARGEST_CODE)
                scale = span if span > 0 else np.float32(1.0)
                inverse = np.float32(np.float32(1.0) / scale)
                zero = np.float32(8.0)
                if not symmetric:
                    zero = np.float32(np.rint(-low * inverse))
                scales[block, group, lane] = scale
                zeros[block, group, lane] = np.int8(zero)
                smallest = np.float32(-zero)
                largest = np.float32(LARGEST_CODE - zero)
                for k in range(size):
                    level = np.float32(values[k] * inverse)
                    level = min(max(level, smallest), largest)
                    rounded[k] = np.float32(level + ROUNDING_CONSTANT)
                code_offset = np.uint32(zero)
                row_pairs = pairs[pair, start : start + size]
                total = np.uint32(0)
                if lane % 16 < 8:
                    for k in range(size):
                        code = np.uint32((rounded_bits[k] + code_offset) & np.uint32(15))
                        row_pairs[k] = np.uint8(code)
                        total = np.uint32(total + code)
                else:
                    for k in range(size):
                        code = np.uint32((rounded_bits[k] + code_offset) & np.uint32(15))
                        row_pairs[k] |= np.uint8(code << np.uint32(4))
                        total = np.uint32(total + code)
                centred = np.int64(total) - np.int64(zero) * size
                words[block, group, 16 * num_fours + lane] = np.uint32(centred)
        for group in range(num_groups):
            out = words[block, group]
            for four in range(num_fours):
                for pair in range(16):
                    out[16 * four + pair] = pair_words[pair, group * num_fours + four]
