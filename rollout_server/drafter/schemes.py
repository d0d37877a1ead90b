"""Round-to-nearest quantization of a linear layer's weight. Pure torch, no vLLM.

The reference for the faster kernels of ``cpu_kernels.py`` and ``triton_quantization.py``, which
give the same codes and scales to the last bit. For that every code is the weight *times the
reciprocal* of its scale, the reciprocal rounded once, and ties go to the even code: what vector
units and vLLM's own int8 kernels compute. Dividing by the scale instead differs only where that
one rounding moves a weight across the middle of two codes (int8, bfloat16: 4 weights in 10,000).

Legend: N output channels, K input channels, G groups of input channels (K / group size),
P int32 words of packed codes (K / 8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

INT8_MAX = 127
INT4_MAX_CODE = 15
INT4_SYMMETRIC_ZERO_CODE = 8
INT4_CODES_PER_WORD = 8
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max  # 448
WEIGHTS_AT_A_TIME = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Float32 copies are made of this many weights, so that they add no layers to the peak memory of a
rebuild. Kernel launches are dear on CUDA."""


def rows_at_a_time(weight_NK: torch.Tensor) -> int:
    """Rows whose intermediate results stay small (and, on the CPU, in its cache)."""
    weights = WEIGHTS_AT_A_TIME.get(weight_NK.device.type, 1 << 25)
    return max(weights // max(weight_NK.shape[1], 1), 1)


def _by_rows(
    weight_NK: torch.Tensor, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """``quantize(weight_NK)``, some rows at a time; its results have a row for each row."""
    num_rows, step = len(weight_NK), rows_at_a_time(weight_NK)
    if num_rows <= step:
        return quantize(weight_NK)
    whole: tuple[torch.Tensor, ...] = ()
    for start in range(0, num_rows, step):
        parts = quantize(weight_NK[start : start + step])
        if not whole:
            whole = tuple(part.new_empty((num_rows, *part.shape[1:])) for part in parts)
        for tensor, part in zip(whole, parts, strict=True):
            tensor[start : start + step] = part
    return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Weight:
    """Per-output-channel symmetric int8: ``weight_NK ~= values_NK * scales_N1``."""

    values_NK: torch.Tensor  # int8 [N, K]
    scales_N1: torch.Tensor  # float32 [N, 1]


def quantize_int8_per_channel(weight_NK: torch.Tensor) -> Int8Weight:
    """Round each output channel to the nearest of 255 levels spanning its largest magnitude.

    A channel of zeros gets scale 1, so that dividing by it is harmless.

    Args:
        weight_NK: floating point [N, K].
    """
    values_NK, scales_N1 = _by_rows(weight_NK, _int8_rows)
    return Int8Weight(values_NK=values_NK, scales_N1=scales_N1)


def _int8_rows(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight_float_NK = weight_NK.to(torch.float32)
    largest_N1 = weight_float_NK.abs().amax(dim=1, keepdim=True)
    scales_N1 = torch.where(largest_N1 > 0, largest_N1 / INT8_MAX, torch.ones_like(largest_N1))
    values_NK = (weight_float_NK * scales_N1.reciprocal()).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values_NK.to(torch.int8), scales_N1


def dequantize_int8(weight: Int8Weight) -> torch.Tensor:
    """The float32 [N, K] weight that ``weight`` stands for."""
    return weight.values_NK.to(torch.float32) * weight.scales_N1


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Weight:
    """Group-wise uint4: ``weight ~= (code - zero) * scale`` within each group.

    Word p of a row holds the codes of input channels 8p..8p+7, the first in the lowest four bits
    (the layout GPTQ and compressed-tensors checkpoints have, and vLLM's repacking starts from).
    """

    packed_NP: torch.Tensor  # int32 [N, K / 8]
    scales_NG: torch.Tensor  # float32 [N, K / group size]
    zeros_NG: torch.Tensor | None  # uint8 codes [N, K / group size]; None: symmetric, code 8
    group_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Weight:
    """Per-output-channel float8 e4m3: ``weight_NK ~= values_NK * scales_N1``."""

    values_NK: torch.Tensor  # float8_e4m3fn [N, K]
    scales_N1: torch.Tensor  # float32 [N, 1]


def check_int4_groups(num_columns: int, group_size: int) -> None:
    """
    Raises:
        ValueError: K is no multiple of ``group_size``, or ``group_size`` none of 8.
    """
    if group_size % INT4_CODES_PER_WORD or num_columns % group_size:
        raise ValueError(
            f"int4 groups of {group_size} do not divide a layer's {num_columns} input channels "
            f"(group sizes are multiples of {INT4_CODES_PER_WORD})"
        )


def quantize_int4_groups(
    weight_NK: torch.Tensor, *, group_size: int, symmetric: bool
) -> Int4Weight:
    """Round each group of input channels to the nearest of 16 levels.

    Symmetric: levels -8..7 of ``largest magnitude / 7.5``, so that rounding clips at most half a
    level at the positive end. Asymmetric: the levels span the group's own range, zero included, so
    that a weight of zero stays zero.

    Raises:
        ValueError: K is no multiple of ``group_size``, or ``group_size`` none of 8.
    """
    check_int4_groups(weight_NK.shape[1], group_size)
    packed_NP, scales_NG, *zeros_NG = _by_rows(
        weight_NK, partial(_int4_rows, group_size=group_size, symmetric=symmetric)
    )
    return Int4Weight(
        packed_NP=packed_NP,
        scales_NG=scales_NG,
        zeros_NG=zeros_NG[0] if zeros_NG else None,
        group_size=group_size,
    )


def _int4_rows(
    weight_NK: torch.Tensor, *, group_size: int, symmetric: bool
) -> tuple[torch.Tensor, ...]:
    """Packed codes, scales, and zero points unless symmetric."""
    num_rows, num_columns = weight_NK.shape
    groups_NGS = weight_NK.to(torch.float32).view(num_rows, -1, group_size)
    zeros: tuple[torch.Tensor, ...] = ()
    if symmetric:
        span_NG = groups_NGS.abs().amax(dim=2) / 7.5
        scales_NG = torch.where(span_NG > 0, span_NG, torch.ones_like(span_NG))
        inverse_NG = scales_NG.reciprocal()
        codes_NGS = torch.round(groups_NGS * inverse_NG[..., None]) + INT4_SYMMETRIC_ZERO_CODE
    else:
        lowest_NG = groups_NGS.amin(dim=2).clamp_(max=0)
        highest_NG = groups_NGS.amax(dim=2).clamp_(min=0)
        span_NG = (highest_NG - lowest_NG) / INT4_MAX_CODE
        scales_NG = torch.where(span_NG > 0, span_NG, torch.ones_like(span_NG))
        inverse_NG = scales_NG.reciprocal()
        zero_NG = torch.round(-lowest_NG * inverse_NG)
        codes_NGS = torch.round(groups_NGS * inverse_NG[..., None]) + zero_NG[..., None]
        zeros = (zero_NG.to(torch.uint8),)
    codes_NK = codes_NGS.clamp_(0, INT4_MAX_CODE).to(torch.uint8).view(num_rows, num_columns)
    bytes_NB = codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)
    return (bytes_NB.contiguous().view(torch.int32), scales_NG, *zeros)


def unpack_int4_codes(weight: Int4Weight) -> torch.Tensor:
    """The codes, uint8 [N, K]."""
    bytes_NB = weight.packed_NP.contiguous().view(torch.uint8)
    codes_NB2 = torch.stack((bytes_NB & INT4_MAX_CODE, bytes_NB >> 4), dim=2)
    return codes_NB2.view(weight.packed_NP.shape[0], -1)


def dequantize_int4(weight: Int4Weight) -> torch.Tensor:
    """The float32 [N, K] weight that ``weight`` stands for."""
    codes_NK = unpack_int4_codes(weight)
    num_rows = codes_NK.shape[0]
    groups_NGS = codes_NK.to(torch.float32).view(num_rows, -1, weight.group_size)
    if weight.zeros_NG is None:
        groups_NGS -= INT4_SYMMETRIC_ZERO_CODE
    else:
        groups_NGS -= weight.zeros_NG.to(torch.float32)[..., None]
    return (groups_NGS * weight.scales_NG[..., None]).view(num_rows, -1)


def quantize_fp8_per_channel(weight_NK: torch.Tensor) -> Fp8Weight:
    """Scale each output channel so that its largest magnitude is e4m3's, then round."""
    values_NK, scales_N1 = _by_rows(weight_NK, _fp8_rows)
    return Fp8Weight(values_NK=values_NK, scales_N1=scales_N1)


def _fp8_rows(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight_float_NK = weight_NK.to(torch.float32)
    largest_N1 = weight_float_NK.abs().amax(dim=1, keepdim=True)
    scales_N1 = torch.where(largest_N1 > 0, largest_N1 / FP8_MAX, torch.ones_like(largest_N1))
    values_NK = (weight_float_NK * scales_N1.reciprocal()).clamp_(-FP8_MAX, FP8_MAX)
    return values_NK.to(FP8_DTYPE), scales_N1


def dequantize_fp8(weight: Fp8Weight) -> torch.Tensor:
    """The float32 [N, K] weight that ``weight`` stands for."""
    return weight.values_NK.to(torch.float32) * weight.scales_N1
