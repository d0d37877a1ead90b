"""Makes a push's weights ready in a vLLM worker while it still generates with the old ones.

Module by module, each between two steps: it is loaded in place, as in any push; what came of it is
kept, and the module gets back what it had. In the pause what is ready takes its place, and only
what is left is loaded. On a CPU nearly all weights of a linear layer live in what
``layer.cpu_linear`` refers to (oneDNN's packed form), and the exchange is one assignment. Tensors
are copied: others hold on to their memory (the drafter, CUDA graphs).

Leans on (vLLM 0.32.0): ``initialize_layerwise_reload`` and ``finalize_layerwise_processing`` on one
module; ``get_layerwise_info`` and ``_place_kernel_tensors``, to end a reload that failed;
``layer.cpu_linear`` as set by ``dispatch_cpu_unquantized_gemm``, all of a packed weight.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn import Module
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    finalize_layerwise_processing,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from rollout_server.engine.vllm_plugin.checkpoint import OpenCheckpoint, tensor_names
from rollout_server.engine.vllm_plugin.padded_rows import pad_rows
from rollout_server.engine.vllm_plugin.partial_load import (
    TouchedModule,
    TouchedModules,
    touched_modules,
)
from rollout_server.engine.vllm_plugin.reused_memory import reused_memory

LOGGER = logging.getLogger(__name__)

PACKED_WEIGHT = "cpu_linear"


class LoadAhead:
    """One version, from begin to end. ``close`` it, whether it has come to its end or not.

    Nothing is ready of mixtures of experts, of models that rename their tensors, and of those with
    multi-head latent attention, which computes more weights from what it loads.

    Args:
        path: its file.
        changed: checkpoint tensors that differ from what is loaded; None for all of them.
        limit_bytes: of memory for what is ready, by the size of the tensors in the file; what does
            not fit is left for the pause.
    """

    def __init__(
        self,
        vllm_config: Any,
        model: Any,
        version: int,
        path: str,
        changed: list[str] | None,
        limit_bytes: int,
    ) -> None:
        self.version = version
        self._vllm_config = vllm_config
        self._model = model
        self._ready: list[tuple[TouchedModule, _State]] = []
        available = tensor_names(path)
        touched = None
        if not vllm_config.model_config.use_mla:
            touched = touched_modules(model, available if changed is None else changed, available)
        self._work = self._modules(path, touched, limit_bytes)

    def advance(self, budget_s: float) -> bool:
        """Go on for about ``budget_s``, a module at the least. True when it is done, or when a
        module could not be loaded: that one and those after it are left for the pause."""
        deadline_s = time.perf_counter() + budget_s
        with set_current_vllm_config(self._vllm_config), torch.no_grad(), reused_memory():
            for _ in self._work:
                torch.accelerator.synchronize()
                if time.perf_counter() >= deadline_s:
                    return False
        return True

    def close(self) -> None:
        """Let go of what is ready, and of the file. The memory stays for the next version."""
        self._work.close()
        self._ready.clear()

    def take_place(self) -> frozenset[str]:
        """Serve what is ready from now on. Returns the checkpoint tensors this takes care of."""
        ready, self._ready = self._ready, []
        for part, state in ready:
            state.put_into(part.module)
        return frozenset(name for part, _ in ready for name in part.tensor_names)

    def _modules(
        self, path: str, touched: TouchedModules | None, limit_bytes: int
    ) -> Generator[None, None, None]:
        if touched is None:
            return
        num_ranks = get_tensor_model_parallel_world_size()
        num_bytes = 0
        with OpenCheckpoint(path) as checkpoint:
            for part in touched.parts:
                # A tied LM head is packed from the embedding after that is loaded.
                if isinstance(part.module, VocabParallelEmbedding):
                    continue
                tensors = checkpoint.read(part.tensor_names)
                size = sum(tensor.nbytes for tensor in tensors.values()) // num_ranks
                if num_bytes + size > limit_bytes:
                    continue
                num_bytes += size
                state = self._load_beside(part, tensors)
                if state is None:
                    return
                self._ready.append((part, state))
                yield

    def _load_beside(self, part: TouchedModule, tensors: dict[str, torch.Tensor]) -> _State | None:
        """What a module would be with these weights, None if it cannot be; it stays what it is."""
        module = part.module
        before = _State.of(module)
        after: _State | None = None
        try:
            pad_rows(module)
            initialize_layerwise_reload(module)
            self._model.load_weights(iter(tensors.items()))
            finalize_layerwise_processing(module, self._vllm_config.model_config)
            after = _State.of(module)
        except Exception:
            # vLLM raises anything, out of memory above all. The pause tries again; and of several
            # ranks none may raise alone: vLLM would take a later answer for this one.
            LOGGER.exception("version %d: %s is not loaded ahead", self.version, part.name)
        try:
            info = get_layerwise_info(module)
            if info.can_load():  # it failed half-way
                _place_kernel_tensors(module, info)
                info.reset()
            before.put_into(module)
        except Exception:
            # The module may be a mixture, and nobody may be served by one.
            LOGGER.exception("%s cannot be put back, the worker ends", part.name)
            os._exit(1)
        return after


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """A module's weights: copies of its tensors, and its packed form where it has one."""

    tensors: dict[str, torch.Tensor]
    packed: Any

    @classmethod
    def of(cls, module: Module) -> Self:
        return cls(
            tensors={name: t.detach().clone() for name, t in _tensors(module).items()},
            packed=getattr(module, PACKED_WEIGHT, None),
        )

    def put_into(self, module: Module) -> None:
        for name, tensor in _tensors(module).items():
            tensor.data.copy_(self.tensors[name])
        if self.packed is not None:
            setattr(module, PACKED_WEIGHT, self.packed)


def _tensors(module: Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
