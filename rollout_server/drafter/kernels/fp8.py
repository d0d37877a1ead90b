"""vLLM's float8 W8A8 matrix multiplication on CUDA, and a plain one for everywhere else.

Leans on (vLLM 0.32.0): ``scaled_fp8_quant``, ``cutlass_scaled_mm`` (which goes to a Triton kernel
by itself for sizes CUTLASS cannot take), ``w8a8_utils.cutlass_fp8_supported``.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.w8a8_utils import cutlass_fp8_supported

from rollout_server.drafter.kernels.base import LayerShape, num_tensor_bytes
from rollout_server.drafter.schemes import FP8_DTYPE, FP8_MAX, Fp8Weight


def has_fast_fp8(device_type: str) -> bool:
    """Whether the device multiplies float8 in hardware through vLLM's kernels (sm89 and up)."""
    return device_type == "cuda" and bool(cutlass_fp8_supported())


class _Fp8Buffers:
    """The packed weight, whose addresses stay across pushes."""

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._values_KN: torch.Tensor | None = None
        self._scales_N1: torch.Tensor | None = None

    def pack(self, weight: Fp8Weight) -> None:
        if self._values_KN is None or self._scales_N1 is None:
            # A transposed view of [N, K]: CUTLASS wants the weight column-major.
            self._values_KN = weight.values_NK.clone().t()
            self._scales_N1 = weight.scales_N1.clone()
            return
        self._values_KN.copy_(weight.values_NK.t())
        self._scales_N1.copy_(weight.scales_N1)

    def _packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._values_KN is not None, "drafter layer used before its weight was packed"
        assert self._scales_N1 is not None
        return self._values_KN, self._scales_N1

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self._values_KN, self._scales_N1) if t is not None]

    def num_bytes(self) -> int:
        return num_tensor_bytes(self.tensors())


class CutlassFp8Matmul(_Fp8Buffers):
    """Activations rounded to e4m3 per token, multiplied by CUTLASS."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values_KN, scales_N1 = self._packed()
        dtype = self._shape.kernel_dtype
        x_2d = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        quantized, scales = ops.scaled_fp8_quant(x_2d, use_per_token_if_dynamic=True)
        bias = None if bias is None else bias.to(dtype)
        out = ops.cutlass_scaled_mm(quantized, values_KN, scales, scales_N1, dtype, bias)
        return out.to(x.dtype).view(*x.shape[:-1], self._shape.num_outputs)


class PlainFp8Matmul(_Fp8Buffers):
    """The same arithmetic without a float8 kernel: the weight is widened at every call.

    It saves memory and costs time: a 2048 x 8192 layer takes about 90 ms at batch 1 on two cores
    without AMX, oneDNN's bfloat16 takes 1.2 ms. ``torch._scaled_mm`` takes 147 ms there, and
    vLLM's own CPU kernel needs AMX-FP8 (Diamond Rapids).
    """

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values_KN, scales_N1 = self._packed()
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
