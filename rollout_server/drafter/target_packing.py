"""Packs the drafter from the target's own parameters, without a checkpoint (CUDA).

vLLM keeps a bfloat16 linear layer's weight readable on CUDA, with the shards fused and split over
tensor-parallel ranks exactly as the drafter's: quantizing reads device memory once instead of
moving the checkpoint over PCIe a second time. On CPU oneDNN packs the target's weights away, so
there the drafter is fed by the checkpoint (``requantization.py``).
"""

from __future__ import annotations

import torch
from torch.nn import Module

from rollout_server.drafter.sharing import draft_linear_methods


@torch.no_grad()
def pack_from_target(drafter: Module, target: Module) -> int:
    """Quantize every drafter layer from the target layer of the same name, in place.

    Returns:
        Number of layers packed.

    Raises:
        RuntimeError: a target weight is not a readable floating-point matrix.
    """
    target_modules = dict(target.named_modules())
    methods = draft_linear_methods(drafter)
    for name, method in methods.items():
        weight = getattr(target_modules.get(name), "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise RuntimeError(
                f"target layer {name!r} has no readable weight to build the drafter from"
            )
        method.pack(weight.data)
    return len(methods)
