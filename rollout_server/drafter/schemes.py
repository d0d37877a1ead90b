"""Round-to-nearest quantization of a linear layer's weight. Pure torch, no vLLM.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT8_MAX = 127


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
    weight_float_NK = weight_NK.to(torch.float32)
    largest_N1 = weight_float_NK.abs().amax(dim=1, keepdim=True)
    scales_N1 = torch.where(largest_N1 > 0, largest_N1 / INT8_MAX, torch.ones_like(largest_N1))
    # In place on the float32 copy: the extra memory stays at one layer.
    if weight_float_NK is weight_NK:
        weight_float_NK = weight_NK / scales_N1
    else:
        weight_float_NK.div_(scales_N1)
    values_NK = weight_float_NK.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Int8Weight(values_NK=values_NK, scales_N1=scales_N1)


def dequantize_int8(weight: Int8Weight) -> torch.Tensor:
    """The float32 [N, K] weight that ``weight`` stands for."""
    return weight.values_NK.to(torch.float32) * weight.scales_N1
