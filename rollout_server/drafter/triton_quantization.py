"""Round-to-nearest on CUDA in one pass: read the weight once, write codes and scales once.

Same codes and scales as ``schemes.py``, to the last bit: divisions are correctly rounded, products
are not fused with the additions that follow (``enable_fp_fusion=False``), and rounding goes to the
even code. Tested through Triton's interpreter in ``tests/unit/test_triton_quantization.py``.

Kernel parameters carry no types: Triton's compiler reads annotations as code and refuses ``Any``
(its interpreter does not look).

Legend: N output channels, K input channels, G groups, P int32 words of eight codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout_server.drafter.schemes import (
    INT4_CODES_PER_WORD,
    Int4Weight,
    Int8Weight,
    check_int4_groups,
)

ROWS_PER_PROGRAM = 16
WIDE_ROW = 8192
"""Input channels from which a row is spread over more warps."""


def quantize_int4_groups_triton(
    weight_NK: torch.Tensor, *, group_size: int, symmetric: bool
) -> Int4Weight:
    """``schemes.quantize_int4_groups`` for a CUDA tensor.

    Raises:
        ValueError: as there; also for a group size that is no power of two.
    """
    num_rows, num_columns = weight_NK.shape
    check_int4_groups(num_columns, group_size)
    if group_size & (group_size - 1):
        raise ValueError(f"int4 groups of {group_size}: the Triton kernel takes powers of two")
    weight_NK = weight_NK.contiguous()
    num_groups = num_columns // group_size
    device = weight_NK.device
    packed_NP = torch.empty(
        (num_rows, num_columns // INT4_CODES_PER_WORD), dtype=torch.int32, device=device
    )
    scales_NG = torch.empty((num_rows, num_groups), dtype=torch.float32, device=device)
    zeros_NG = torch.empty(
        (num_rows, num_groups) if not symmetric else (0, 0), dtype=torch.uint8, device=device
    )
    _int4_kernel[(triton.cdiv(num_rows, ROWS_PER_PROGRAM), num_groups)](
        weight_NK,
        packed_NP,
        scales_NG,
        zeros_NG,
        num_rows,
        num_columns,
        num_groups,
        SYMMETRIC=symmetric,
        GROUP_WORDS=group_size // INT4_CODES_PER_WORD,
        ROWS=ROWS_PER_PROGRAM,
        enable_fp_fusion=False,
    )
    return Int4Weight(
        packed_NP=packed_NP,
        scales_NG=scales_NG,
        zeros_NG=None if symmetric else zeros_NG,
        group_size=group_size,
    )


def quantize_int8_per_channel_triton(weight_NK: torch.Tensor) -> Int8Weight:
    """``schemes.quantize_int8_per_channel`` for a CUDA tensor."""
    num_rows, num_columns = weight_NK.shape
    weight_NK = weight_NK.contiguous()
    values_NK = torch.empty((num_rows, num_columns), dtype=torch.int8, device=weight_NK.device)
    scales_N1 = torch.empty((num_rows, 1), dtype=torch.float32, device=weight_NK.device)
    _int8_kernel[(num_rows,)](
        weight_NK,
        values_NK,
        scales_N1,
        num_columns,
        COLUMNS=triton.next_power_of_2(num_columns),
        num_warps=16 if num_columns > WIDE_ROW else 4,
        enable_fp_fusion=False,
    )
    return Int8Weight(values_NK=values_NK, scales_N1=scales_N1)


@triton.jit
def _round_to_even(x):  # type: ignore[no-untyped-def]
    # 1.5 * 2**23 leaves no fraction bits in a float32 sum. Magnitudes here stay below 2**22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _int4_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    num_rows,
    num_columns,
    num_groups,
    SYMMETRIC: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One group of ``ROWS`` rows: tiles [ROWS, GROUP_WORDS, 8]."""
    group = tl.program_id(1)
    # 64 bits: an LM head may have more than 2**31 weights.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < num_rows
    word = group * GROUP_WORDS + tl.arange(0, GROUP_WORDS)
    nibble = tl.arange(0, 8)
    column = word[None, :, None] * 8 + nibble[None, None, :]
    weight = tl.load(
        weight_ptr + row[:, None, None] * num_columns + column,
        mask=row_mask[:, None, None],
        other=0.0,
    ).to(tl.float32)

    lowest = tl.minimum(tl.min(tl.min(weight, axis=2), axis=1), 0.0)
    highest = tl.maximum(tl.max(tl.max(weight, axis=2), axis=1), 0.0)
    if SYMMETRIC:
        span = tl.div_rn(tl.maximum(highest, -lowest), tl.full([ROWS], 7.5, tl.float32))
    else:
        span = tl.div_rn(highest - lowest, tl.full([ROWS], 15.0, tl.float32))
    scale = tl.where(span > 0, span, 1.0)
    inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), scale)
    if SYMMETRIC:
        zero = tl.full([ROWS], 8.0, tl.float32)
    else:
        zero = _round_to_even(-lowest * inverse)
        tl.store(zeros_ptr + row * num_groups + group, zero.to(tl.uint8), mask=row_mask)
    tl.store(scales_ptr + row * num_groups + group, scale, mask=row_mask)

    code = _round_to_even(weight * inverse[:, None, None]) + zero[:, None, None]
    code = tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)
    # The nibbles do not overlap, so their sum is their union.
    packed = tl.sum(code << (4 * nibble)[None, None, :], axis=2)
    tl.store(
        packed_ptr + row[:, None] * (num_columns // 8) + word[None, :],
        packed,
        mask=row_mask[:, None],
    )


@triton.jit
def _int8_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, values_ptr, scales_ptr, num_columns, COLUMNS: tl.constexpr
):
    """One row, held in registers between finding its scale and writing its codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < num_columns
    start = row * num_columns
    weight = tl.load(weight_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(weight), axis=0)
    span = tl.div_rn(largest, 127.0)
    scale = tl.where(largest > 0, span, 1.0)
    inverse = tl.div_rn(1.0, scale)
    code = tl.minimum(tl.maximum(_round_to_even(weight * inverse), -127.0), 127.0)
    tl.store(values_ptr + start + column, code.to(tl.int8), mask=mask)
    tl.store(scales_ptr + row, scale)
