"""Packs the drafter from the target's own parameters, without a checkpoint (CUDA).

vLLM keeps a bfloat16 linear layer's weight readable on CUDA, with the shards fused and split over
tensor-parallel ranks exactly as the drafter's: quantizing reads device memory once instead of
moving the checkpoint over PCIe a second time. On CPU oneDNN packs the target's weights away, so
there the drafter is fed by the checkpoint (``requantization.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from rollout_server.drafter.sharing import draft_linear_methods

READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight that vLLM has not quantized may be in."""


def unreadable_layers(drafter: Module, target: Module) -> list[str]:
    """Drafter layers whose target weight is absent or not a plain matrix (a quantized target)."""
    modules = dict(target.named_modules(remove_duplicate=False))
    return [
        name
        for name in draft_linear_methods(drafter)
        if not _is_readable(getattr(modules.get(name), "weight", None))
    ]


def _is_readable(weight: torch.Tensor | None) -> bool:
    return weight is not None and weight.dim() == 2 and weight.dtype in READABLE_DTYPES


@torch.no_grad()
def pack_from_target(drafter: Module, target: Module) -> int:
    """Quantize every drafter layer from the target layer of the same name, in place.

    Returns:
        Number of layers packed.

    Raises:
        RuntimeError: a target weight is not a readable floating-point matrix.
    """
    unreadable = unreadable_layers(drafter, target)
    if unreadable:
        raise RuntimeError(
            f"target layer {unreadable[0]!r} has no readable weight to build the drafter from "
            f"({len(unreadable)} such layers)"
        )
    modules: dict[str, Any] = dict(target.named_modules(remove_duplicate=False))
    methods = draft_linear_methods(drafter)
    for name, method in methods.items():
        method.pack(modules[name].weight.data)
    return len(methods)
