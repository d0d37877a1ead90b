"""vLLM's int8 W8A8 matrix multiplications: oneDNN on CPU, CUTLASS or Triton on CUDA.

Leans on (vLLM 0.32.0): ``vllm._custom_ops.create_onednn_scaled_mm`` and the ops
``_C.dynamic_scaled_int8_quant``, ``_C.onednn_scaled_mm`` on CPU; ``scaled_int8_quant``,
``cutlass_scaled_mm``, ``triton_scaled_mm`` on CUDA.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm import _custom_ops as ops

from rollout_server.drafter.kernels.base import LayerShape, num_tensor_bytes
from rollout_server.drafter.kernels.channel_buffers import ChannelBuffers
from rollout_server.drafter.schemes import Int8Weight

ONEDNN_PRIMITIVE_CACHE_SIZE = 32
MAX_SCRATCH_ROWS = 64
BLACKWELL_CAPABILITY = 100
"""From here on CUTLASS has no int8 kernels (NVIDIA dropped the instructions' speed)."""


@lru_cache(maxsize=16)
def _activation_scratch(num_rows: int, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for quantized activations and their scales, shared by all layers of one width.

    Layers run one after the other, and nothing reads a layer's quantized input after it.
    """
    # Made outside inference mode, a tensor may be written in any mode.
    with torch.inference_mode(False):
        values = torch.empty((num_rows, num_inputs), dtype=torch.int8)
        return values, torch.empty((num_rows, 1), dtype=torch.float32)


class OnednnInt8Matmul:
    """oneDNN on x86: int8 weights packed by oneDNN, activations quantized per token."""

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._num_outputs = shape.num_outputs
        self._num_inputs = shape.num_inputs
        # The overloads themselves: name lookup and argument wrapping cost as much as a small layer.
        self._quantize = torch.ops._C.dynamic_scaled_int8_quant.default
        self._multiply = torch.ops._C.onednn_scaled_mm.default
        self._handler: ops.CPUDNNLGEMMHandler | None = None
        self._handler_tensor: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    def pack(self, weight: Int8Weight) -> None:
        # oneDNN keeps a raw pointer to the scales: they must live as long as the handler,
        # otherwise the output turns to NaN.
        scales = weight.scales_N1.contiguous()
        handler = ops.create_onednn_scaled_mm(
            weight.values_NK.t(),
            scales,
            self._shape.dtype,
            True,  # activations are quantized dynamically
            False,  # symmetric: no zero points
            ONEDNN_PRIMITIVE_CACHE_SIZE,
        )
        self._handler, self._handler_tensor, self._scales = handler, handler.handler_tensor, scales

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dim() != 2:
            x_2d = x.reshape(-1, self._num_inputs)
            return self.apply(x_2d, bias).view(*x.shape[:-1], self._num_outputs)
        num_rows = x.shape[0]
        if num_rows <= MAX_SCRATCH_ROWS:
            quantized, scales = _activation_scratch(num_rows, self._num_inputs)
        else:
            quantized = torch.empty((num_rows, self._num_inputs), dtype=torch.int8)
            scales = torch.empty((num_rows, 1), dtype=torch.float32)
        self._quantize(quantized, x.contiguous(), scales, None)
        out = x.new_empty((num_rows, self._num_outputs))
        self._multiply(out, quantized, scales, None, None, bias, self._handler_tensor)
        return out

    def tensors(self) -> list[torch.Tensor]:
        return []  # the weight lives inside oneDNN's handler

    def num_bytes(self) -> int:
        if self._scales is None:
            return 0
        return self._num_outputs * self._num_inputs + num_tensor_bytes([self._scales])


class CudaInt8Matmul(ChannelBuffers):
    """CUTLASS on sm75 to sm90, vLLM's Triton kernel from sm100 on."""

    def __init__(self, shape: LayerShape, *, compute_capability: int | None) -> None:
        super().__init__(shape)
        self._use_triton = (compute_capability or 0) >= BLACKWELL_CAPABILITY

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values_KN, scales_N1 = self.packed()
        dtype = self._shape.kernel_dtype
        x_2d = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        quantized, scales, _ = ops.scaled_int8_quant(x_2d, None, None, True)
        bias = None if bias is None else bias.to(dtype)
        if self._use_triton:
            # Imported where it is used: on CPU Triton has no backend.
            from vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm import (  # noqa: E501
                triton_scaled_mm,
            )

            out = triton_scaled_mm(quantized, values_KN, scales, scales_N1, dtype, bias)
        else:
            out = ops.cutlass_scaled_mm(quantized, values_KN, scales, scales_N1, dtype, bias)
        return out.to(x.dtype).view(*x.shape[:-1], self._shape.num_outputs)
