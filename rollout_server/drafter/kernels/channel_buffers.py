"""Packed weights with a scale per output channel, column-major (int8 and fp8). Pure torch."""

from __future__ import annotations

import torch

from rollout_server.drafter.kernels.base import LayerShape, num_tensor_bytes
from rollout_server.drafter.schemes import Fp8Weight, Int8Weight


class ChannelBuffers:
    """Holds the packed weight of a layer, at addresses that stay across pushes."""

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._values_KN: torch.Tensor | None = None
        self._scales_N1: torch.Tensor | None = None

    def pack(self, weight: Int8Weight | Fp8Weight) -> None:
        if self._values_KN is None or self._scales_N1 is None:
            # A transposed view of [N, K]: the kernels want the weight column-major.
            self._values_KN = weight.values_NK.clone().t()
            self._scales_N1 = weight.scales_N1.clone()
            return
        self._values_KN.copy_(weight.values_NK.t())
        self._scales_N1.copy_(weight.scales_N1)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [K, N] and scales [N, 1]."""
        assert self._values_KN is not None, "drafter layer used before its weight was packed"
        assert self._scales_N1 is not None
        return self._values_KN, self._scales_N1

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self._values_KN, self._scales_N1) if t is not None]

    def num_bytes(self) -> int:
        return num_tensor_bytes(self.tensors())
