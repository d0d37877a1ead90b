"""Which of a vLLM model's modules a push touches, and reloading only those.

A module is the unit: vLLM packs it as a whole, so all of its checkpoint tensors are loaded where
one of them has changed.

Leans on (vLLM 0.32.0): ``packed_modules_mapping`` of models; ``initialize_layerwise_reload``, which
prepares just the modules below the one it is given, and ``finalize_layerwise_processing``, which
passes over those that were not prepared.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.nn import Module


@dataclass(frozen=True, kw_only=True, slots=True)
class TouchedModules:
    """A part of a model, with the checkpoint tensors that make it up."""

    modules: list[Module]
    module_names: frozenset[str]
    tensor_names: frozenset[str]


def touched_modules(
    model: Module, changed: Collection[str], available: Collection[str]
) -> TouchedModules | None:
    """The modules that hold the changed tensors.

    Args:
        changed, available: names of checkpoint tensors; ``available`` are all of them.

    Returns:
        None where that cannot be told by their names (experts, models that rename their tensors):
        then everything is to be loaded.
    """
    fused_of = {
        part: fused
        for fused, parts in getattr(model, "packed_modules_mapping", {}).items()
        for part in parts
    }

    def module_of(tensor_name: str) -> str:
        parent, _, last = tensor_name.rpartition(".")[0].rpartition(".")
        last = fused_of.get(last, last)
        return f"{parent}.{last}" if parent else last

    modules = dict(model.named_modules(remove_duplicate=False))
    names = frozenset(module_of(name) for name in changed)
    found = []
    for name in sorted(names):
        module = modules.get(name)
        if module is None or next(module.children(), None) is not None:
            return None
        found.append(module)
    return TouchedModules(
        modules=found,
        module_names=names,
        tensor_names=frozenset(name for name in available if module_of(name) in names),
    )
