"""vLLM's int8 W8A8 matrix multiplications behind one small interface, per device.

Leans on (vLLM 0.32.0): ``vllm._custom_ops.create_onednn_scaled_mm``, ``onednn_scaled_int8_quant``,
``onednn_scaled_mm`` on CPU; ``scaled_int8_quant``, ``cutlass_scaled_mm`` on CUDA.
"""

from __future__ import annotations

from typing import Protocol

import torch
from vllm import _custom_ops as ops

from rollout_server.drafter.schemes import Int8Weight

ONEDNN_PRIMITIVE_CACHE_SIZE = 32


class QuantizedMatmul(Protocol):
    """Holds one layer's packed weight and multiplies by it."""

    def pack(self, weight: Int8Weight) -> None:
        """Take over a freshly quantized weight of the same shape."""
        ...

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] -> [..., N]`` in ``x``'s dtype."""
        ...

    def num_bytes(self) -> int:
        """Memory held for the weight and its scales."""
        ...


class OnednnInt8Matmul:
    """oneDNN on x86: int8 weights packed by oneDNN, activations quantized per token."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._handler: ops.CPUDNNLGEMMHandler | None = None
        self._scales: torch.Tensor | None = None
        self._num_bytes = 0

    def pack(self, weight: Int8Weight) -> None:
        # oneDNN keeps a raw pointer to the scales: they must live as long as the handler,
        # otherwise the output turns to NaN.
        scales = weight.scales_N1.contiguous()
        handler = ops.create_onednn_scaled_mm(
            weight.values_NK.t(),
            scales,
            self._dtype,
            True,  # activations are quantized dynamically
            False,  # symmetric: no zero points
            ONEDNN_PRIMITIVE_CACHE_SIZE,
        )
        self._handler, self._scales = handler, scales
        self._num_bytes = weight.values_NK.numel() + scales.numel() * scales.element_size()

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        handler = self._handler
        assert handler is not None, "drafter layer used before its weight was packed"
        x_2d = x.reshape(-1, x.shape[-1])
        quantized, scales, _ = ops.onednn_scaled_int8_quant(x_2d, None, None, True)
        out = torch.empty((x_2d.shape[0], handler.n), dtype=x.dtype)
        ops.onednn_scaled_mm(handler, quantized, out, scales, None, None, bias)
        return out.view(*x.shape[:-1], handler.n)

    def num_bytes(self) -> int:
        return self._num_bytes


class CutlassInt8Matmul:
    """CUTLASS on CUDA (sm75 to sm90). Buffers keep their addresses across ``pack``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._values_KN: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    def pack(self, weight: Int8Weight) -> None:
        if self._values_KN is None or self._scales is None:
            # A transposed view of [N, K]: CUTLASS wants the weight column-major.
            self._values_KN = weight.values_NK.clone().t()
            self._scales = weight.scales_N1.clone()
            return
        self._values_KN.copy_(weight.values_NK.t())
        self._scales.copy_(weight.scales_N1)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert self._values_KN is not None, "drafter layer used before its weight was packed"
        x_2d = x.reshape(-1, x.shape[-1])
        quantized, scales, _ = ops.scaled_int8_quant(x_2d.contiguous(), None, None, True)
        out = ops.cutlass_scaled_mm(
            quantized, self._values_KN, scales, self._scales, self._dtype, bias
        )
        return out.view(*x.shape[:-1], self._values_KN.shape[1])

    def num_bytes(self) -> int:
        if self._values_KN is None or self._scales is None:
            return 0
        return self._values_KN.numel() + self._scales.numel() * self._scales.element_size()


def make_int8_matmul(device_type: str, dtype: torch.dtype) -> QuantizedMatmul:
    """The int8 kernel of a device.

    Raises:
        ValueError: no int8 kernel for the device.
    """
    if device_type == "cpu":
        return OnednnInt8Matmul(dtype)
    if device_type == "cuda":
        return CutlassInt8Matmul(dtype)
    raise ValueError(f"drafter.scheme int8 has no kernel for device {device_type!r}")
