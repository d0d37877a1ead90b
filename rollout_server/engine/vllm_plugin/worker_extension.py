"""Methods added to vLLM's worker (``worker_extension_cls``), called by ``AsyncLLM.collective_rpc``.

They run in every tensor-parallel rank, between engine steps. Leans on (vLLM 0.32.0):
``initialize_layerwise_reload`` / ``finalize_layerwise_processing`` (in-place reload that re-packs
layer by layer), ``Worker.model_runner.get_model()``.

vLLM's own weight-update session is not used for this transport: a failure inside it leaves the
session open for good, whereas here a failed load poisons the engine and the server replaces it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import Module
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_processing,
    initialize_layerwise_reload,
)

from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.drafter.requantization import requantize, requantize_changed
from rollout_server.drafter.sharing import (
    draft_linear_methods,
    num_unshared_bytes,
    token_embedding,
)
from rollout_server.drafter.target_packing import pack_from_target, unreadable_layers
from rollout_server.engine.vllm_plugin.expert_repair import repack_experts
from rollout_server.engine.vllm_plugin.partial_load import touched_modules
from rollout_server.engine.vllm_plugin.weight_audit import WeightAudit, auditable_modules
from shared.types import DrafterScheme


class SlipstreamWorkerExtension:
    """Mixed into the worker class. All names carry the ``slipstream_`` prefix."""

    vllm_config: Any
    model_runner: Any
    _slipstream_staged: dict[int, str]

    def slipstream_stage(self, version: int, path: str) -> int:
        """Look into the file (or model directory) and remember it; nothing is served from it yet.
        Returns tensor count."""
        if not hasattr(self, "_slipstream_staged"):
            self._slipstream_staged = {}
        num_tensors = 0
        for file_path in safetensors_files(path):
            with safe_open(file_path, framework="pt") as file:
                num_tensors += len(file.keys())
        self._slipstream_staged[version] = path
        return num_tensors

    def slipstream_discard(self, version: int) -> None:
        """Forget a staged version."""
        getattr(self, "_slipstream_staged", {}).pop(version, None)

    def slipstream_load(
        self,
        version: int,
        rebuild: bool = True,
        changed: list[str] | None = None,
        changed_for_drafter: list[str] | None = None,
    ) -> dict[str, float]:
        """Replace the target's weights and rebuild the drafter. Generation must be paused.

        Args:
            rebuild: False leaves the drafter as it is (``drafter.requantize_every``).
            changed: checkpoint tensors that differ from what is loaded; None for all of them.
            changed_for_drafter: those that differ from what the drafter was made of.

        Returns:
            ``load_s`` and ``requantize_s``.

        Raises:
            KeyError: the version was not staged.
        """
        path = self._slipstream_staged.pop(version)
        model = self.model_runner.get_model()
        started = time.perf_counter()
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            load_target(model, path, changed, self.vllm_config.model_config)
            loaded = time.perf_counter()
            proposer = SelfDraftProposer.active
            if proposer is not None and rebuild:
                rebuild_drafter(proposer, model, path, changed_for_drafter)
        torch.accelerator.synchronize()
        finished = time.perf_counter()
        return {"load_s": loaded - started, "requantize_s": finished - loaded}

    def slipstream_audit_modules(self) -> list[str]:
        """Names of the modules that ``slipstream_audit`` takes."""
        return auditable_modules(self.model_runner.get_model())

    def slipstream_audit(
        self, path: str, module_names: list[str], with_drafter: bool
    ) -> list[tuple[str, str]]:
        """Compare live weights with a file or a model directory: ``(parameter, AuditStatus)``.

        Args:
            with_drafter: False for a drafter that is not of the file's version.
        """
        proposer = SelfDraftProposer.active if with_drafter else None
        with torch.no_grad():
            audit = WeightAudit(
                self.model_runner.get_model(),
                None if proposer is None else proposer.model,
                safetensors_files(path),
            )
            findings = [f for name in module_names for f in audit.check(name)]
        return [(finding.name, finding.status.value) for finding in findings]

    def slipstream_drafter(self) -> dict[str, Any]:
        """The drafter's scheme, and the bytes it holds of its own: packed weights, and whatever is
        not shared with the target."""
        proposer = SelfDraftProposer.active
        if proposer is None:
            return {
                "drafter_scheme": DrafterScheme.NONE.value,
                "drafter_bytes": 0,
                "num_drafter_layers": 0,
            }
        methods = draft_linear_methods(proposer.model)
        packed = sum(method.num_bytes() for method in methods.values())
        unshared = num_unshared_bytes(proposer.model, self.model_runner.get_model())
        return {
            "drafter_scheme": proposer.plan.scheme.value,
            "drafter_bytes": packed + unshared,
            "num_drafter_layers": len(methods),
        }


def load_target(model: Any, path: str, changed: list[str] | None, model_config: Any) -> None:
    """Load a file's tensors; only those modules that ``changed`` touches, where it is given."""
    touched = None if changed is None else touched_modules(model, changed, tensor_names(path))
    if touched is None:
        initialize_layerwise_reload(model)
        model.load_weights(iterate_safetensors(path))
    else:
        for module in touched.modules:
            initialize_layerwise_reload(module)
        model.load_weights(iterate_safetensors(path, touched.tensor_names))
    finalize_layerwise_processing(model, model_config)
    repack_tied_lm_head(model)
    if touched is None:
        repack_experts(model)  # packed again only if they were loaded again


def rebuild_drafter(
    proposer: SelfDraftProposer, target: Module, path: str, changed: list[str] | None
) -> None:
    """From the target's parameters where they can be read, else from the file once more."""
    touched = None if changed is None else touched_modules(target, changed, tensor_names(path))
    if proposer.device.type == "cuda" and not unreadable_layers(proposer.model, target):
        pack_from_target(proposer.model, target, None if touched is None else touched.module_names)
    elif touched is None or changed is None:
        requantize(proposer.model, iterate_safetensors(path))
    else:
        methods = draft_linear_methods(proposer.model).values()
        takes_shards = all(method.takes_single_shards() for method in methods)
        names = frozenset(changed) if takes_shards else touched.tensor_names
        requantize_changed(proposer.model, dict(iterate_safetensors(path, names)))


def repack_tied_lm_head(model: Any) -> None:
    """A tied LM head gets no weight of its own in a reload, so vLLM leaves alone what it packed
    from the old one (on CPU, inside a oneDNN handler): pack it again from the new embedding.

    Removal check: the tied case of ``tests/integration/test_weight_push_engine.py``.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, ParallelLMHead):
        return
    _, embedding = token_embedding(model)
    if head.weight.data_ptr() == embedding.weight.data_ptr():
        head.quant_method.process_weights_after_loading(head)


def safetensors_files(path: str) -> list[str]:
    """The file itself, or the files of a model directory."""
    if not os.path.isdir(path):
        return [path]
    return sorted(str(file) for file in Path(path).glob("*.safetensors"))


def tensor_names(path: str) -> list[str]:
    """Of a file, or a model directory."""
    names: list[str] = []
    for file_path in safetensors_files(path):
        with safe_open(file_path, framework="pt") as file:
            names += file.keys()
    return names


def iterate_safetensors(
    path: str, names: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, tensor)`` over memory-mapped files, one tensor at a time.

    Args:
        path: a file, or a model directory.
        names: only these.
    """
    for file_path in safetensors_files(path):
        with safe_open(file_path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if names is None or name in names:
                    yield name, file.get_tensor(name)
