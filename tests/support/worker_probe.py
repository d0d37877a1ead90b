"""Worker extension of test engines (vLLM 0.32.0): looks into the worker and plants errors in it.

Called through ``tests.support.engine.probe``. An engine with a planted error belongs to its test.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from vllm.triton_utils.dispatcher import register_kernels
from vllm.utils import cpu_triton_utils

from rollout_server.drafter import verification
from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.engine.vllm_plugin import speculative_steps
from rollout_server.engine.vllm_plugin.worker_extension import SlipstreamWorkerExtension
from tests.support.kv_guard import KvGuard

EXPAND_KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"
_RESIDUAL = verification._ProposedRows.residual


class WorkerProbe(SlipstreamWorkerExtension):
    """All names carry the ``probe_`` prefix."""

    _probe_guard: KvGuard
    _probe_calls: Counter[str]

    def probe_guard_kv(self, poison: bool) -> None:
        """Watch the KV cache from now on; with ``poison`` overwrite what no request may read."""
        self._probe_guard = KvGuard(self.model_runner, poison=poison)

    def probe_plant_stray_write(self, block: int, slot: int) -> None:
        """From now on every step also writes this slot."""
        self._probe_guard.plant_stray_write_at = (block, slot)

    def probe_swap_draft_slots(self) -> None:
        """Planted error: the drafter writes each request's entries where another's belong."""
        proposer: Any = SelfDraftProposer.active
        move_on = proposer._update_positions_dependent_metadata

        def swapped(positions: Any, metadata: Any, batch_size: int, *args: Any) -> torch.Tensor:
            result = move_on(positions, metadata, batch_size, *args)
            slots = proposer._slot_mapping_buffer[:batch_size]
            slots.copy_(slots.flip(0))
            return result

        proposer._update_positions_dependent_metadata = swapped

    def probe_take_swap_back(self) -> None:
        proposer: Any = SelfDraftProposer.active
        del proposer._update_positions_dependent_metadata

    def probe_kv_report(self) -> dict[str, Any]:
        """``KvReport`` since the guard was installed; the guard is taken out."""
        self._probe_guard.uninstall()
        return asdict(self._probe_guard.report)

    def probe_save_kv(self, path: str) -> None:
        """``KvGuard.valid_kv`` into a file."""
        torch.save(self._probe_guard.valid_kv(), path)

    def probe_block_bytes(self, request_id_prefix: str) -> list[bytes]:
        """Bytes of the full blocks of a request seen by the guard, per layer and block."""
        guard = self._probe_guard
        (name,) = [name for name in guard.computed if name.startswith(request_id_prefix)]
        blocks, valid = guard.computed[name]
        caches = {cache.data_ptr(): cache for cache in self.model_runner.kv_caches}.values()
        block_size = next(iter(caches)).shape[2]
        return [
            cache[block].contiguous().numpy().tobytes()
            for cache in caches
            for block in blocks[: valid // block_size]
        ]

    def probe_computed_positions(self) -> int:
        """Positions the target was scheduled to compute since the guard was installed."""
        return self._probe_guard.num_positions

    def probe_drop_residual(self, dropped: bool) -> None:
        """Planted error: rejected drafts are replaced by draws from the target's distribution
        instead of what is left of it after the draft's. False takes it back."""

        def from_the_target(rows: Any, target_BV: torch.Tensor, *args: Any) -> torch.Tensor:
            return target_BV

        verification._ProposedRows.residual = from_the_target if dropped else _RESIDUAL

    def probe_blunt_drafter(self, blunt: bool) -> None:
        """No error: a drafter of twice the temperature, so that many drafts are rejected."""
        proposer = SelfDraftProposer.active
        assert proposer is not None
        model = proposer.model
        if not blunt:
            del model.compute_logits
            return
        original = model.compute_logits
        model.compute_logits = lambda hidden_states: original(hidden_states) * 0.5

    def probe_mix_in_token(self, token: int, rate: float) -> None:
        """Planted error: the target's distribution is (1 - rate) of itself plus rate of ``token``,
        a total variation of ``rate * (1 - its probability)``. For sampling at temperature 1."""
        original = self.model_runner._sample

        def from_the_mixture(logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
            mixed = logits.softmax(dim=-1) * (1 - rate)
            mixed[:, token] += rate
            return original(mixed.log(), spec_decode_metadata)

        self.model_runner._sample = from_the_mixture

    def probe_take_mixture_back(self) -> None:
        del self.model_runner._sample

    def probe_undo_kernel_repair(self, undone: bool) -> None:
        """vLLM's own expand kernel, as before ``apply_kernel_repair``. False repairs it again."""
        implementation = cpu_triton_utils._expand_kernel_impl
        if undone:
            # The plugin has replaced the name in the module, so the module is executed once more.
            source = importlib.util.find_spec(cpu_triton_utils.__name__)
            assert source is not None
            assert source.loader is not None
            stock = importlib.util.module_from_spec(source)
            source.loader.exec_module(stock)
            implementation = stock._expand_kernel_impl
        register_kernels({EXPAND_KERNEL: implementation})

    def probe_count_calls(self) -> None:
        """Count what speculation adds to a step."""
        calls = self._probe_calls = Counter()
        proposer = SelfDraftProposer.active
        assert proposer is not None
        for owner, name in (
            (self, "take_draft_token_ids"),
            (speculative_steps, "verify"),
            (proposer, "propose"),
            (proposer, "prepare_next_token_ids_padded"),
        ):
            setattr(owner, name, _counted(getattr(owner, name), calls, name))

    def probe_calls(self) -> dict[str, int]:
        """Calls by name since ``probe_count_calls``."""
        return dict(self._probe_calls)


def _counted(function: Any, calls: Counter[str], name: str) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return wrapped
