"""Packed weights with a scale per output channel, column-major (int8 and fp8). Pure torch."""

from __future__ import annotations

import torch

from rollout_server.drafter.kernels.base import LayerShape, num_tensor_bytes
from rollout_server.drafter.schemes import Int8Weight


class ChannelBuffers:
    """Holds the packed weight of a layer, at addresses that stay across pushes."""

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._values_KN: torch.Tensor | None = None
        self._scales_N1: torch.Tensor | None = None

    def pack(self, weight: Int8Weight) -> None:
        values_KN, scales_N1 = self.buffers(weight.values_NK.dtype, weight.values_NK.device)
        values_KN.copy_(weight.values_NK.t())
        scales_N1.copy_(weight.scales_N1)

    def buffers(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [K, N] and scales [N, 1], to be written; made by the first call."""
        if self._values_KN is None or self._scales_N1 is None:
            num_outputs, num_inputs = self._shape.num_outputs, self._shape.num_inputs
            # A transposed view of [N, K]: the kernels want the weight column-major.
            self._values_KN = torch.empty((num_outputs, num_inputs), dtype=dtype, device=device).t()
            self._scales_N1 = torch.empty((num_outputs, 1), dtype=torch.float32, device=device)
        return self._values_KN, self._scales_N1

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [K, N] and scales [N, 1]."""
        assert self._values_KN is not None, "drafter layer used before its weight was packed"
        assert self._scales_N1 is not None
        return self._values_KN, self._scales_N1

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self._values_KN, self._scales_N1) if t is not None]

    def num_bytes(self) -> int:
        return num_tensor_bytes(self.tensors())
