"""Rebuilds the drafter of a vLLM worker in place from the weights just received."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch.nn import Module

from rollout_server.drafter.quantization import DraftLinearMethod
from rollout_server.drafter.shards import checkpoint_names, shard_names
from rollout_server.drafter.sharing import draft_linear_methods, token_embedding

LM_HEAD_WEIGHT = "lm_head.weight"
NUMBERED = re.compile(r".*?\.\d+(?=\.)")
ReadTensors = Callable[[Collection[str]], Mapping[str, torch.Tensor]]
"""Checkpoint tensors of these names, as far as there are any."""


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
    _load_whole(drafter, weights, methods)
    return len(methods)


def requantize_by_block(
    drafter: Module, read: ReadTensors, changed: Collection[str] | None
) -> Iterator[None]:
    """``requantize``, or ``requantize_changed``, in steps of one decoder block.

    Between two steps the drafter is a mixture of two versions. It may draft all the same, only
    worse.

    Args:
        changed: names of the checkpoint tensors to feed; None for all, of every layer.

    Raises:
        as those two, at any step. The drafter then stays a mixture.
    """
    methods = draft_linear_methods(drafter)
    packed_modules = getattr(drafter, "packed_modules_mapping", {})
    for block in _blocks(methods):
        wanted = checkpoint_names(block, packed_modules)
        if "lm_head" in block and block["lm_head"].is_tied:
            wanted |= {_embedding_weight(drafter)}
        if changed is None:
            _load_whole(drafter, read(wanted).items(), block)
            yield
        elif names := wanted.intersection(changed):
            requantize_changed(drafter, read(names))
            yield


def _blocks(methods: Mapping[str, DraftLinearMethod]) -> list[dict[str, DraftLinearMethod]]:
    """Layers by what their names have up to a number: ``model.layers.7``; others on their own."""
    blocks: dict[str, dict[str, DraftLinearMethod]] = {}
    for name, method in methods.items():
        numbered = NUMBERED.match(name)
        blocks.setdefault(name if numbered is None else numbered[0], {})[name] = method
    return list(blocks.values())


def _load_whole(
    drafter: Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    methods: Mapping[str, DraftLinearMethod],
) -> None:
    packed_before = {name: method.num_packed for name, method in methods.items()}
    _load(drafter, weights, methods)
    stale = sorted(
        name
        for name, method in methods.items()
        if method.num_packed == packed_before[name] or method.is_loading()
    )
    if stale:
        raise RuntimeError(
            f"{len(stale)} drafter layers did not get their whole weight, first {stale[0]!r}"
        )


def requantize_changed(drafter: Module, weights: Mapping[str, torch.Tensor]) -> int:
    """Feed only the checkpoint tensors that a push changed; other layers stay as they are.

    A fused layer (q, k, v; gate, up) of which some shards changed keeps the packed form of the
    others. Where its kernel repacks whole layers (tensor parallelism, or a CUDA kernel with a
    layout of its own) all of its shards must be given; nothing is changed if one is missing.

    Args:
        drafter: the vLLM draft model.
        weights: checkpoint name to full unsharded tensor. Names that feed no quantized layer are
            ignored: they are the target's own.

    Returns:
        Number of layers repacked, in whole or in part.

    Raises:
        ValueError: shards of a fused layer are missing, naming the layer and the shards.
    """
    methods = draft_linear_methods(drafter)
    packed_modules = getattr(drafter, "packed_modules_mapping", {})
    touched: dict[str, DraftLinearMethod] = {}
    for name, method in methods.items():
        wanted = shard_names(name, packed_modules)
        if name == "lm_head" and method.is_tied:
            wanted = frozenset({_embedding_weight(drafter)})
        missing = sorted(wanted - weights.keys())
        if len(missing) == len(wanted):
            continue
        if missing and not method.takes_single_shards():
            raise ValueError(
                f"drafter layer {name!r} is repacked as a whole on this device, and the push lacks "
                f"{', '.join(missing)}: send all shards of a fused layer"
            )
        touched[name] = method
    if touched:
        _load(drafter, weights.items(), touched)
    for method in touched.values():
        method.accept_missing_shards()
    return len(touched)


def _load(
    drafter: Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    methods: Mapping[str, DraftLinearMethod],
) -> None:
    try:
        drafter.load_weights(_linear_weights(weights, drafter, methods))
    except BaseException:
        for method in methods.values():
            method.drop_staging()
        raise


def _linear_weights(
    weights: Iterable[tuple[str, torch.Tensor]], drafter: Module, layer_names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Only what quantized layers need. Anything else would be written into the target's tensors.

    The embedding also feeds a tied, quantized LM head.
    """
    wanted = checkpoint_names(layer_names, getattr(drafter, "packed_modules_mapping", {}))
    head = drafter.lm_head if LM_HEAD_WEIGHT in wanted else None
    is_tied = head is not None and head.quant_method.is_tied
    embedding_weight = _embedding_weight(drafter) if is_tied else None
    for name, tensor in weights:
        if head is not None and name == embedding_weight:
            head.weight.weight_loader(head.weight, tensor)
        elif name in wanted and not (is_tied and name == LM_HEAD_WEIGHT):
            yield name, tensor


def _embedding_weight(drafter: Module) -> str:
    name, _ = token_embedding(drafter)
    return f"{name}.weight"
