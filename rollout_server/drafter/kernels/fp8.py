"""vLLM's float8 W8A8 matrix multiplication on CUDA, and a plain one for everywhere else.

Leans on (vLLM 0.32.0): ``scaled_fp8_quant``, ``cutlass_scaled_mm`` (which goes to a Triton kernel
by itself for sizes CUTLASS cannot take), ``w8a8_utils.cutlass_fp8_supported``.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.w8a8_utils import cutlass_fp8_supported

from rollout_server.drafter.kernels.channel_buffers import ChannelBuffers
from rollout_server.drafter.schemes import (
    FP8_DTYPE,
    FP8_MAX,
    quantize_fp8_per_channel,
    rows_at_a_time,
)


def has_fast_fp8(device_type: str) -> bool:
    """Whether the device multiplies float8 in hardware through vLLM's kernels (sm89 and up)."""
    return device_type == "cuda" and bool(cutlass_fp8_supported())


class Fp8Rows(ChannelBuffers):
    """Quantizes rows straight into the packed weight: no channel's scale depends on another."""

    row_multiple = 1

    def pack_rows(self, weight_RK: torch.Tensor, first_row: int) -> None:
        """Some rows at a time, whatever the size of the layer."""
        values_KN, scales_N1 = self.buffers(FP8_DTYPE, weight_RK.device)
        values_NK = values_KN.t()
        num_rows = rows_at_a_time(weight_RK)
        for start in range(0, len(weight_RK), num_rows):
            piece = quantize_fp8_per_channel(weight_RK[start : start + num_rows])
            rows = slice(first_row + start, first_row + start + len(piece.scales_N1))
            values_NK[rows].copy_(piece.values_NK)
            scales_N1[rows].copy_(piece.scales_N1)


class CutlassFp8Matmul(Fp8Rows):
    """Activations rounded to e4m3 per token, multiplied by CUTLASS."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values_KN, scales_N1 = self.packed()
        dtype = self._shape.kernel_dtype
        x_2d = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        quantized, scales = ops.scaled_fp8_quant(x_2d, use_per_token_if_dynamic=True)
        bias = None if bias is None else bias.to(dtype)
        out = ops.cutlass_scaled_mm(quantized, values_KN, scales, scales_N1, dtype, bias)
        return out.to(x.dtype).view(*x.shape[:-1], self._shape.num_outputs)


class PlainFp8Matmul(Fp8Rows):
    """The same arithmetic without a float8 kernel: the weight is widened at every call.

    It saves memory and costs time: a 2048 x 8192 layer takes about 90 ms at batch 1 on two cores
    without AMX, oneDNN's bfloat16 takes 1.2 ms. ``torch._scaled_mm`` takes 147 ms there, and
    vLLM's own CPU kernel needs AMX-FP8 (Diamond Rapids).
    """

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values_KN, scales_N1 = self.packed()
        x_float = x.to(torch.float32)
        largest = x_float.abs().amax(dim=-1, keepdim=True)
        scales = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
        rounded = (x_float / scales).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
        # e4m3 values are exact in every wider type, and the scales stay in float32.
        out = rounded.to(x.dtype).matmul(values_KN.to(x.dtype)).to(torch.float32)
        out = out.mul_(scales).mul_(scales_N1.flatten())
        if bias is not None:
            out.add_(bias)
        return out.to(x.dtype)
