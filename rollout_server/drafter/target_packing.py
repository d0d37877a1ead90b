"""Packs the drafter from the target's own parameters, without a checkpoint (CUDA).

vLLM keeps a bfloat16 linear layer's weight readable on CUDA, with the shards fused and split over
tensor-parallel ranks exactly as the drafter's: quantizing reads device memory once instead of
moving the checkpoint over PCIe a second time. On CPU oneDNN packs the target's weights away, so
there the drafter is fed by the checkpoint (``requantization.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn import Module

from rollout_server.drafter.sharing import draft_linear_methods, token_embedding

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
def pack_from_target(
    drafter: Module, target: Module, module_names: Collection[str] | None = None
) -> int:
    """Quantize drafter layers from the target layers of the same name, in place.

    Args:
        module_names: those of the target that changed; None for all. A tied LM head follows the
            embedding.

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
    num_packed = 0
    for name, method in draft_linear_methods(drafter).items():
        is_tied_head = name == "lm_head" and method.is_tied
        source = token_embedding(drafter)[0] if is_tied_head else name
        if module_names is None or source in module_names:
            method.pack(modules[name].weight.data)
            num_packed += 1
    return num_packed
