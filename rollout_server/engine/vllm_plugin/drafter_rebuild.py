"""Makes a vLLM worker's drafter anew from the file its target was loaded from, block by block.

Leans on (vLLM 0.32.0): ``set_current_vllm_config``, inside of which layers load.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module
from vllm.config import set_current_vllm_config

from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.drafter.requantization import requantize_by_block
from rollout_server.drafter.sharing import draft_linear_methods
from rollout_server.drafter.target_packing import pack_from_target, unreadable_layers
from rollout_server.engine.vllm_plugin.checkpoint import OpenCheckpoint, tensor_names
from rollout_server.engine.vllm_plugin.partial_load import touched_modules
from rollout_server.engine.vllm_plugin.reused_memory import reused_memory


class DrafterRebuilding:
    """One rebuild, from begin to end; there is nothing to go back to in between.

    Args:
        path: the file or model directory that the target was loaded from.
        changed: checkpoint tensors that differ from what the drafter was made of; None for all.
    """

    def __init__(
        self, proposer: SelfDraftProposer, target: Module, path: str, changed: list[str] | None
    ) -> None:
        self._blocks = rebuild_by_block(proposer, target, path, changed)
        next(self._blocks)  # opens the file, which may lose its name before the first block

    def advance(self, vllm_config: Any, budget_s: float) -> bool:
        """Go on for about ``budget_s``, a block at the least. True when it is done."""
        deadline_s = time.perf_counter() + budget_s
        with set_current_vllm_config(vllm_config), torch.no_grad(), reused_memory():
            for _ in self._blocks:
                torch.accelerator.synchronize()
                if time.perf_counter() >= deadline_s:
                    return False
        return True


def rebuild_by_block(
    proposer: SelfDraftProposer, target: Module, path: str, changed: list[str] | None
) -> Iterator[None]:
    """From the target's parameters where they can be read, all at once, else from the file. Yields
    once when all is there that it needs, and again after every block."""
    touched = None if changed is None else touched_modules(target, changed, tensor_names(path))
    if proposer.device.type == "cuda" and not unreadable_layers(proposer.model, target):
        yield
        pack_from_target(proposer.model, target, None if touched is None else touched.module_names)
        yield
        return
    names: frozenset[str] | None = None
    if touched is not None and changed is not None:
        methods = draft_linear_methods(proposer.model).values()
        takes_shards = all(method.takes_single_shards() for method in methods)
        names = frozenset(changed) if takes_shards else touched.tensor_names
    with OpenCheckpoint(path) as checkpoint:
        yield
        yield from requantize_by_block(proposer.model, checkpoint.read, names)
