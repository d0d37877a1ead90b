"""What every quantized matrix multiplication of the drafter offers. Pure torch.

Legend: N output channels, K input channels (of this tensor-parallel rank).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

WeightT = TypeVar("WeightT")
WeightT_contra = TypeVar("WeightT_contra", contravariant=True)

HALF_DTYPES = (torch.bfloat16, torch.float16)


class UnsupportedLayerError(ValueError):
    """No kernel of the scheme takes this layer: the drafter uses the target's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """One rank's part of a linear layer."""

    num_outputs: int  # N
    num_inputs: int  # K
    dtype: torch.dtype  # of activations in and out

    @property
    def kernel_dtype(self) -> torch.dtype:
        """What half-precision kernels compute in: a float32 model drafts in bfloat16."""
        return self.dtype if self.dtype in HALF_DTYPES else torch.bfloat16


class QuantizedMatmul(Protocol[WeightT_contra]):
    """Holds one layer's packed weight and multiplies by it."""

    def pack(self, weight: WeightT_contra) -> None:
        """Take over a freshly quantized weight of the same shape.

        On CUDA the values go into the buffers of the first call, whose addresses graphs hold.
        """
        ...

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] -> [..., N]`` in ``x``'s dtype."""
        ...

    def tensors(self) -> list[torch.Tensor]:
        """Packed weight, scales and zero points, where they are torch tensors."""
        ...

    def num_bytes(self) -> int:
        """Memory held for the packed weight, its scales and zero points."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftKernel(Generic[WeightT]):
    """A scheme on a device, for one layer: the quantizer and the kernel that takes its result."""

    quantize: Callable[[torch.Tensor], WeightT]
    matmul: QuantizedMatmul[WeightT]
    note: str | None = None
    """Set where the layer gets something other than what was asked for, with the reason."""

    def pack(self, weight_NK: torch.Tensor) -> None:
        """Quantize this rank's complete weight [N, K] and put it in use."""
        self.matmul.pack(self.quantize(weight_NK))


class RowsMatmul(Protocol):
    """A multiplication that quantizes rows of a weight straight into its own packed tensors."""

    row_multiple: int
    """Rows are replaced in blocks of this many."""

    def pack_rows(self, weight_RK: torch.Tensor, first_row: int) -> None:
        """Quantize ``weight_RK`` into the rows from ``first_row`` on; both whole blocks."""
        ...

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] -> [..., N]`` in ``x``'s dtype."""
        ...

    def tensors(self) -> list[torch.Tensor]:
        """Packed weight, scales and zero points."""
        ...

    def num_bytes(self) -> int:
        """Memory held for the packed weight, its scales and zero points."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsKernel:
    """A scheme on a device, for one layer, quantizer and kernel in one. No rows depend on others:
    a fused layer takes its shards one by one, and never exists as a whole in floating point."""

    matmul: RowsMatmul
    note: str | None = None
    """As in ``DraftKernel``."""

    def pack(self, weight_NK: torch.Tensor) -> None:
        """Quantize this rank's complete weight [N, K] and put it in use."""
        self.matmul.pack_rows(weight_NK, 0)

    def takes_rows(self, first_row: int, num_rows: int) -> bool:
        """Whether these rows are whole blocks."""
        return not (first_row % self.matmul.row_multiple or num_rows % self.matmul.row_multiple)


def has_ops(names: tuple[str, ...]) -> bool:
    """Whether vLLM's build for this processor has these kernels (``torch.ops._C``)."""
    return all(hasattr(torch.ops._C, name) for name in names)


def num_tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the elements of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
