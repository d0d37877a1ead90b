"""vLLM's int4 W4A8 matrix multiplication on x86 CPUs: the fewest bytes a draft pass can read.

vLLM itself only takes this kernel where the CPU has AMX tiles, although for a handful of rows it
runs on AVX-512 VNNI as well, at a quarter of bfloat16's bytes: and a draft pass has a handful of
rows. With more rows than ``MAX_ROWS_WITHOUT_AMX`` it falls onto a path that is slow without AMX, so
those are multiplied a few at a time.

Weights are packed here, straight from the quantizer's codes: vLLM's own conversion starts from AWQ
checkpoints and takes 40 ns a weight. Activations are quantized to 8 bits per row inside the kernel.

One block is 32 output channels by one group of G input channels. Its bytes, in order::

    for four input channels k..k+3 (G / 4 times):
        for half in 0, 1:  for j in 0..7:  for k in k..k+3:
            one byte: low four bits code[16 half + j, k], high ones code[16 half + 8 + j, k]
    then 32 int32: the sum over the group of (code - zero), per output channel

Legend: N output channels, K input channels, G group size, g groups (K / G), R rows of activations.

Leans on (vLLM 0.32.0): ``torch.ops._C.int4_scaled_mm_cpu`` and the layout that
``_custom_ops.convert_weight_packed_scale_zp`` makes for it (a test holds the two together).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from vllm import _custom_ops as ops

from rollout_server.drafter.kernels.base import (
    LayerShape,
    UnsupportedLayerError,
    has_ops,
    num_tensor_bytes,
)
from rollout_server.drafter.schemes import (
    INT4_SYMMETRIC_ZERO_CODE,
    Int4Weight,
    dequantize_int4,
    quantize_int4_groups,
    unpack_int4_codes,
)

OPTIONAL_OPS = ("int4_scaled_mm_cpu",)
"""Not in every build of vLLM: without it, or if it multiplies wrongly, WNA16 takes the layer."""
BLOCK_OUTPUTS = 32
MAX_ROWS_WITHOUT_AMX = 4
"""Measured: 5 to 7 rows cost more per row, from 8 on the kernel is several times slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VnniInt4Weight:
    """The kernel's own layout."""

    blocks: torch.Tensor  # uint8 [N / 32, g, G * 16 + 128]
    zeros: torch.Tensor  # int8 [N / 32, g, 32]
    scales: torch.Tensor  # float32 [N / 32, g, 32]


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether this CPU and this vLLM have the kernel: it is tried once, since vLLM promises it for
    AMX only, and promises nothing of the layout that is packed here."""
    assert ops is not None  # importing it registers the ops
    if not has_ops(OPTIONAL_OPS) or not (
        torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(64, 128, generator=generator, dtype=torch.float32)
    x = torch.randn(3, 128, generator=generator, dtype=torch.float32)
    # Asymmetric: a zero point that is left out, or put elsewhere, shows.
    quantized = quantize_int4_groups(weight_NK + 0.5, group_size=32, symmetric=False)
    shape = LayerShape(num_outputs=64, num_inputs=128, dtype=torch.float32)
    matmul = VnniInt4Matmul(shape, group_size=32)
    try:
        matmul.pack(quantized)
        out = matmul.apply(x, None)
    except RuntimeError:
        # The op is there but refuses to run on this processor, or takes other arguments.
        return False
    expected = x @ dequantize_int4(quantized).t()
    return bool((out - expected).norm() < 0.05 * expected.norm())


def pack_for_vnni(weight: Int4Weight) -> VnniInt4Weight:
    """Rearrange codes into the kernel's blocks."""
    num_outputs, num_groups = weight.scales_NG.shape
    group_size = weight.group_size
    num_blocks = num_outputs // BLOCK_OUTPUTS
    codes = unpack_int4_codes(weight)
    # Output channel = 16 half + 8 high + j; input channel = group, four, k.
    halves = codes.view(num_blocks, 2, 2, 8, num_groups, group_size // 4, 4)
    pairs = halves[:, :, 0] | (halves[:, :, 1] << 4)  # [blocks, half, j, g, G / 4, 4]
    # The four bytes of consecutive input channels stay together: move them as one word.
    words = pairs.contiguous().view(torch.int32).squeeze(-1).permute(0, 3, 4, 1, 2)
    zeros_NG = weight.zeros_NG
    sums_NG = codes.view(num_outputs, num_groups, group_size).sum(dim=2, dtype=torch.int32)
    if zeros_NG is None:
        zeros_NG = torch.full_like(sums_NG, INT4_SYMMETRIC_ZERO_CODE, dtype=torch.int8)
    sums_NG -= zeros_NG.to(torch.int32) * group_size
    blocks = torch.empty(num_blocks, num_groups, group_size * 16 + 128, dtype=torch.uint8)
    blocks[..., : group_size * 16].view(torch.int32).copy_(words.flatten(2))
    blocks[..., group_size * 16 :].view(torch.int32).copy_(_by_block(sums_NG))
    return VnniInt4Weight(
        blocks=blocks,
        zeros=_by_block(zeros_NG.to(torch.int8)).contiguous(),
        scales=_by_block(weight.scales_NG).contiguous(),
    )


def _by_block(values_NG: torch.Tensor) -> torch.Tensor:
    """[N, g] as [N / 32, g, 32]."""
    num_groups = values_NG.shape[1]
    return values_NG.view(-1, BLOCK_OUTPUTS, num_groups).transpose(1, 2)


class VnniInt4Matmul:
    """int4 weights in groups, activations quantized to 8 bits per row."""

    def __init__(self, shape: LayerShape, *, group_size: int) -> None:
        """
        Raises:
            UnsupportedLayerError: the shape does not divide into blocks.
        """
        if shape.num_outputs % BLOCK_OUTPUTS:
            raise UnsupportedLayerError(
                f"{shape.num_outputs} output channels are no multiple of {BLOCK_OUTPUTS}"
            )
        if shape.num_inputs % group_size:
            raise UnsupportedLayerError(
                f"{shape.num_inputs} input channels are no multiple of the group size {group_size}"
            )
        self._shape = shape
        self._weight: VnniInt4Weight | None = None
        self._multiply = torch.ops._C.int4_scaled_mm_cpu.default
        self._max_rows = None if torch.cpu._is_amx_tile_supported() else MAX_ROWS_WITHOUT_AMX

    def pack(self, weight: Int4Weight) -> None:
        packed = pack_for_vnni(weight)
        if self._weight is None:
            self._weight = packed
            return
        self._weight.blocks.copy_(packed.blocks)
        self._weight.zeros.copy_(packed.zeros)
        self._weight.scales.copy_(packed.scales)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = self._weight
        assert weight is not None, "drafter layer used before its weight was packed"
        x_RK = x.reshape(-1, self._shape.num_inputs).to(torch.bfloat16).contiguous()
        num_rows = x_RK.shape[0]
        step = self._max_rows or num_rows
        parts = [
            self._multiply(
                x_RK[start : start + step], weight.blocks, weight.zeros, weight.scales, None
            )
            for start in range(0, num_rows, step)
        ]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)
        if bias is not None:
            out.add_(bias)
        return out.view(*x.shape[:-1], self._shape.num_outputs)

    def tensors(self) -> list[torch.Tensor]:
        weight = self._weight
        return [] if weight is None else [weight.blocks, weight.zeros, weight.scales]

    def num_bytes(self) -> int:
        return num_tensor_bytes(self.tensors())
