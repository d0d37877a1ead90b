"""Methods added to vLLM's worker (``worker_extension_cls``), called by ``AsyncLLM.collective_rpc``.

They run in every tensor-parallel rank, between engine steps. Leans on (vLLM 0.32.0):
``Worker.model_runner.get_model()``.

vLLM's own weight-update session is not used for this transport: a failure inside it leaves the
session open for good, whereas here a failed load poisons the engine and the server replaces it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.config import set_current_vllm_config

from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.drafter.sharing import draft_linear_methods, num_unshared_bytes
from rollout_server.engine.vllm_plugin.checkpoint import safetensors_files, tensor_names
from rollout_server.engine.vllm_plugin.drafter_rebuild import DrafterRebuilding
from rollout_server.engine.vllm_plugin.load_ahead import LoadAhead
from rollout_server.engine.vllm_plugin.reused_memory import reused_memory
from rollout_server.engine.vllm_plugin.target_load import load_target
from rollout_server.engine.vllm_plugin.weight_audit import WeightAudit, auditable_modules
from shared.types import DrafterScheme


class SlipstreamWorkerExtension:
    """Mixed into the worker class. All names carry the ``slipstream_`` prefix."""

    vllm_config: Any
    model_runner: Any
    _slipstream_staged: dict[int, str]
    _slipstream_loaded_path: str
    _slipstream_rebuilding: DrafterRebuilding | None = None
    _slipstream_ahead: LoadAhead | None = None

    def slipstream_stage(self, version: int, path: str) -> int:
        """Look into the file (or model directory) and remember it; nothing is served from it yet.
        Returns tensor count."""
        if not hasattr(self, "_slipstream_staged"):
            self._slipstream_staged = {}
        num_tensors = len(tensor_names(path))
        self._slipstream_staged[version] = path
        self._slipstream_drop_ahead()
        return num_tensors

    def slipstream_begin_ahead(
        self, version: int, changed: list[str] | None, limit_bytes: int
    ) -> None:
        """Get ready to load a staged version ahead of its pause.

        Args:
            changed: checkpoint tensors that differ from what is loaded; None for all of them.
            limit_bytes: of memory for what is ready.

        Raises:
            KeyError: the version was not staged.
        """
        path = self._slipstream_staged[version]
        model = self.model_runner.get_model()
        self._slipstream_ahead = LoadAhead(
            self.vllm_config, model, version, path, changed, limit_bytes
        )

    def slipstream_ahead(self, budget_s: float) -> bool:
        """Go on with it for about so long. True when it is done."""
        ahead = self._slipstream_ahead
        return ahead is None or ahead.advance(budget_s)

    def slipstream_discard(self, version: int) -> None:
        """Forget a staged version."""
        getattr(self, "_slipstream_staged", {}).pop(version, None)
        if self._slipstream_ahead is not None and self._slipstream_ahead.version == version:
            self._slipstream_drop_ahead()

    def _slipstream_drop_ahead(self) -> None:
        ahead, self._slipstream_ahead = self._slipstream_ahead, None
        if ahead is not None:
            ahead.close()

    def slipstream_load(self, version: int, changed: list[str] | None = None) -> float:
        """Replace the target's weights; the drafter stays as it is. Generation must be paused.

        Args:
            changed: checkpoint tensors that differ from what is loaded; None for all of them.

        Returns:
            Seconds.

        Raises:
            KeyError: the version was not staged.
        """
        path = self._slipstream_staged.pop(version)
        model = self.model_runner.get_model()
        started = time.perf_counter()
        self._slipstream_rebuilding = None
        ahead = self._slipstream_ahead
        loaded: frozenset[str] = frozenset()
        if ahead is not None and ahead.version == version:
            loaded = ahead.take_place()
        self._slipstream_drop_ahead()
        with set_current_vllm_config(self.vllm_config), torch.no_grad(), reused_memory():
            load_target(model, path, changed, self.vllm_config.model_config, loaded)
        torch.accelerator.synchronize()
        self._slipstream_loaded_path = path
        return time.perf_counter() - started

    def slipstream_begin_rebuild(self, changed: list[str] | None = None) -> None:
        """Get ready to make the drafter anew from what was loaded last. It must not draft, or only
        as one that is stale, until ``slipstream_rebuild`` says that it is done.

        Args:
            changed: checkpoint tensors that differ from what the drafter was made of; None: all.
        """
        proposer = SelfDraftProposer.active
        if proposer is not None:
            self._slipstream_rebuilding = DrafterRebuilding(
                proposer, self.model_runner.get_model(), self._slipstream_loaded_path, changed
            )

    def slipstream_rebuild(self, budget_s: float) -> bool:
        """Go on with it for about so long. True when it is done, or there is no drafter."""
        rebuilding = self._slipstream_rebuilding
        if rebuilding is None or rebuilding.advance(self.vllm_config, budget_s):
            self._slipstream_rebuilding = None
            return True
        return False

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
