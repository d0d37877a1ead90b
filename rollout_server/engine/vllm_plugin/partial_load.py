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
class TouchedModule:
    """A module, with all of the checkpoint tensors that make it up."""

    name: str
    module: Module
    tensor_names: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class TouchedModules:
    """A part of a model, with the checkpoint tensors that make it up."""

    parts: list[TouchedModule]

    @property
    def modules(self) -> list[Module]:
        return [part.module for part in self.parts]

    @property
    def module_names(self) -> frozenset[str]:
        return frozenset(part.name for part in self.parts)

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(name for part in self.parts for name in part.tensor_names)


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
    tensors: dict[str, set[str]] = {module_of(name): set() for name in changed}
    for name in available:
        if (owner := module_of(name)) in tensors:
            tensors[owner].add(name)
    parts = []
    for name in sorted(tensors):
        module = modules.get(name)
        if module is None or next(module.children(), None) is not None:
            return None
        part = TouchedModule(name=name, module=module, tensor_names=frozenset(tensors[name]))
        parts.append(part)
    return TouchedModules(parts=parts)
