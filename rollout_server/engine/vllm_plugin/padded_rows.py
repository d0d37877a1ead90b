"""On a CPU, vLLM puts layers together in rows that do not all fall on the same cache sets.

oneDNN packs a weight by walking down its columns. Where a row is a large power of two in bytes, as
with hidden sizes of 2048 or 4096, the rows of a column share a few cache sets and push each other
out: packing takes up to twice as long. Rows a cache line longer do not. The packed form is the
same, bit for bit; measured figures are in ``docs/weights.md``.

Leans on (vLLM 0.32.0): ``LayerReloadingInfo.restore_metadata``, from whose strides
``materialize_meta_tensor`` makes what a reload fills; ``UnquantizedLinearMethod`` and
``dispatch_cpu_unquantized_gemm``, which gives oneDNN a weight with its strides;
``check_cpu_sgl_kernel``, the layers whose other kernel takes no strides.
"""

from __future__ import annotations

import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import CpuArchEnum, current_platform

CACHE_LINE_BYTES = 64
PERIOD_BYTES = 1024
"""Rows of a multiple of this are padded."""


def pad_rows(model: Module) -> None:
    """From its next reload on, put the linear layers below ``model`` together in padded rows.

    Does nothing where it would not help: on other devices and processors.
    """
    if not is_packed_by_onednn():
        return
    for layer in model.modules():
        if type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod:
            parameters, _ = get_layerwise_info(layer).restore_metadata
            weight = parameters.get("weight")
            if weight is not None and is_worth_padding(weight):
                parameters["weight"] = _with_padded_rows(weight)


def is_packed_by_onednn() -> bool:
    """Whether large layers are packed by oneDNN here, for x86's caches."""
    return (
        current_platform.is_cpu()
        and not current_platform.is_zen_cpu()
        and current_platform.get_cpu_architecture() is CpuArchEnum.X86
    )


def is_worth_padding(weight: torch.Tensor) -> bool:
    """Whether the rows of a layer's weight get in each other's way.

    Args:
        weight: [num_outputs, num_inputs], of any device; only its layout is looked at.
    """
    if weight.ndim != 2 or not weight.is_contiguous():
        return False
    num_outputs, num_inputs = weight.shape
    if check_cpu_sgl_kernel(num_outputs, num_inputs, weight.dtype):
        return False
    return num_inputs * weight.element_size() % PERIOD_BYTES == 0


def padded_stride(weight: torch.Tensor) -> tuple[int, int]:
    """Of the same shape, a cache line to a row more."""
    return weight.shape[1] + CACHE_LINE_BYTES // weight.element_size(), 1


def _with_padded_rows(weight: torch.Tensor) -> torch.Tensor:
    """A tensor without memory like this one: class and attributes are what a reload goes by."""
    padded = torch.empty_strided(
        weight.shape, padded_stride(weight), dtype=weight.dtype, device="meta"
    )
    padded.__class__ = weight.__class__
    padded.__dict__ = weight.__dict__.copy()
    return padded
