"""vLLM's int8 W8A8 CPU multiplication whose packed weight is an ordinary tensor.

vLLM picks this kernel on CPUs with AMX only, but it runs on every x86 CPU with AVX-512 VNNI. Two
things speak for it there: it quantizes the activations itself, so a layer is one call, and rows can
be requantized in place, in one pass of vLLM's own quantizer and packer over 1 MiB pieces. oneDNN
(``int8.py``) keeps the packed weight to itself, makes a new one for every push, and spends about
ten times a plain copy on packing alone.

Leans on (vLLM 0.32.0): the ops ``_C.int8_scaled_mm_with_quant``, ``_C.dynamic_scaled_int8_quant``
and ``_C.convert_weight_packed`` (which packs blocks of 32 output channels independently, each
followed by its 32 compensation terms).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm import _custom_ops as ops

from rollout_server.drafter.kernels.base import LayerShape, has_ops, num_tensor_bytes

OPTIONAL_OPS = ("int8_scaled_mm_with_quant", "convert_weight_packed")
"""Not in every build of vLLM: without them, or if they multiply wrongly, oneDNN takes the layer."""
ROW_MULTIPLE = 32
COLUMN_MULTIPLE = 32
COMPENSATION_BYTES = 4  # per output channel
PIECE_BYTES = 1 << 20
"""Quantized bytes worked on at a time: they stay in the second-level caches."""


class Int8RowsMatmul:
    """int8 weights in blocks of 32 rows; rows may be replaced at any time."""

    row_multiple = ROW_MULTIPLE

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._num_outputs, self._num_inputs = shape.num_outputs, shape.num_inputs
        self._dtype = shape.kernel_dtype
        width = self._num_inputs + COMPENSATION_BYTES
        # Made outside inference mode, so that a push may write them in any mode.
        with torch.inference_mode(False):
            self._packed = torch.empty((self._num_outputs, width), dtype=torch.int8, device="cpu")
            self._scales = torch.empty(self._num_outputs, dtype=torch.float32, device="cpu")
        self._multiply = torch.ops._C.int8_scaled_mm_with_quant.default

    def pack_rows(self, weight_RK: torch.Tensor, first_row: int) -> None:
        """Quantize ``weight_RK`` into the rows from ``first_row`` on, both multiples of 32."""
        num_rows = weight_RK.shape[0]
        piece_rows = max(PIECE_BYTES // self._num_inputs // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        values = torch.empty((min(piece_rows, num_rows), self._num_inputs), dtype=torch.int8)
        for start in range(0, num_rows, piece_rows):
            stop = min(start + piece_rows, num_rows)
            rows = slice(first_row + start, first_row + stop)
            piece, scales = values[: stop - start], self._scales[rows]
            torch.ops._C.dynamic_scaled_int8_quant(
                piece, weight_RK[start:stop].contiguous(), scales.view(-1, 1), None
            )
            scales.masked_fill_(scales == 0, 1.0)  # a channel of zeros, as in schemes.py
            self._packed[rows].copy_(torch.ops._C.convert_weight_packed(piece))

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x_2d = x.reshape(-1, self._num_inputs).to(self._dtype)
        bias = None if bias is None else bias.to(torch.float32)
        out: torch.Tensor = self._multiply(
            x_2d, self._packed, self._scales, bias, self._dtype, True
        )
        return out.to(x.dtype).view(*x.shape[:-1], self._num_outputs)

    def tensors(self) -> list[torch.Tensor]:
        return [self._packed, self._scales]

    def num_bytes(self) -> int:
        return num_tensor_bytes(self.tensors())


def takes_int8_rows(shape: LayerShape) -> bool:
    """Whether this CPU and this shape can have the kernel."""
    fits = not (shape.num_outputs % ROW_MULTIPLE or shape.num_inputs % COLUMN_MULTIPLE)
    return fits and _kernel_works()


@lru_cache(maxsize=1)
def _kernel_works() -> bool:
    """Try it once: vLLM promises it for AMX only, and builds it for some instruction sets."""
    assert ops is not None  # importing it registers the ops
    if not torch.cpu._is_vnni_supported() or not has_ops(OPTIONAL_OPS):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(3, 128, generator=generator)
    matmul = Int8RowsMatmul(LayerShape(num_outputs=64, num_inputs=128, dtype=torch.float32))
    try:
        matmul.pack_rows(weight, 0)
        out = matmul.apply(x, None)
    except RuntimeError:
        # The op is there but refuses to run on this processor, or takes other arguments.
        return False
    expected = x @ weight.t()
    return bool((out - expected).norm() < 0.05 * expected.norm())
