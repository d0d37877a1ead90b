"""Rebuilds the drafter of a vLLM worker in place from the weights just received."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn import Module

from rollout_server.drafter.sharing import draft_linear_methods

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
LM_HEAD_WEIGHT = "lm_head.weight"


def requantize(drafter: Module, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Feed checkpoint tensors to the quantized layers; everything else is the target's own.

    Args:
        drafter: the vLLM draft model.
        weights: ``(checkpoint name, full unsharded tensor)``; each layer's shards together keep the
            extra memory at one layer.

    Returns:
        Number of layers packed.

    Raises:
        RuntimeError: a quantized layer did not get its whole weight.
    """
    methods = draft_linear_methods(drafter)
    if not methods:
        return 0
    packed_before = {name: method.num_packed for name, method in methods.items()}
    try:
        drafter.load_weights(_linear_weights(weights, drafter, methods))
    except BaseException:
        for method in methods.values():
            method.drop_staging()
        raise
    stale = sorted(
        name
        for name, method in methods.items()
        if method.num_packed == packed_before[name] or method.is_loading()
    )
    if stale:
        raise RuntimeError(
            f"{len(stale)} drafter layers did not get their whole weight, first {stale[0]!r}"
        )
    return len(methods)


def _linear_weights(
    weights: Iterable[tuple[str, torch.Tensor]], drafter: Module, layer_names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Only what quantized layers need. Anything else would be written into the target's tensors.

    The embedding also feeds a tied, quantized LM head.
    """
    wanted = checkpoint_names(layer_names, getattr(drafter, "packed_modules_mapping", {}))
    head = drafter.lm_head if LM_HEAD_WEIGHT in wanted else None
    is_tied = head is not None and head.quant_method.is_tied
    for name, tensor in weights:
        if head is not None and is_tied and name == EMBEDDING_WEIGHT:
            head.weight.weight_loader(head.weight, tensor)
        elif name in wanted and not (is_tied and name == LM_HEAD_WEIGHT):
            yield name, tensor


def checkpoint_names(
    layer_names: Iterable[str], packed_modules: dict[str, list[str]]
) -> frozenset[str]:
    """Checkpoint tensors that make up the given layers.

    Example: ``model.layers.0.self_attn.qkv_proj`` with ``{"qkv_proj": ["q_proj", ...]}`` gives
    ``model.layers.0.self_attn.q_proj.weight``, ... and the fused name itself.
    """
    names: set[str] = set()
    for layer_name in layer_names:
        parent, _, leaf = layer_name.rpartition(".")
        for part in (leaf, *packed_modules.get(leaf, ())):
            names.add(f"{parent}.{part}.weight" if parent else f"{part}.weight")
    return frozenset(names)
