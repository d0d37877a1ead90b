"""From checkpoint tensors to the layers they are fused into. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def checkpoint_names(
    layer_names: Iterable[str], packed_modules: Mapping[str, list[str]]
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


def shard_names(layer_name: str, packed_modules: Mapping[str, list[str]]) -> frozenset[str]:
    """Checkpoint tensors that together make up one layer."""
    parent, _, leaf = layer_name.rpartition(".")
    parts = packed_modules.get(leaf, [leaf])
    return frozenset(f"{parent}.{part}.weight" if parent else f"{part}.weight" for part in parts)


def shard_first_row(
    key: Any, shape: tuple[int, ...], partition_rows: list[int], num_inputs: int
) -> int | None:
    """Where a checkpoint's shard starts in a layer that is not split between ranks; None for a
    tensor that is not exactly one shard (or, without a shard id, the whole layer).

    Args:
        key: vLLM's shard id: ``q``, ``k``, ``v``, a partition's index, None for the whole layer.
        partition_rows: output channels of the partitions, in order.
    """
    index = {"q": 0, "k": 1, "v": 2}.get(key, key) if isinstance(key, str) else key
    if index is None:
        return 0 if shape == (sum(partition_rows), num_inputs) else None
    if not isinstance(index, int) or not 0 <= index < len(partition_rows):
        return None
    return sum(partition_rows[:index]) if shape == (partition_rows[index], num_inputs) else None
