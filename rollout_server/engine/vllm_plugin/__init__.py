"""Entry point of the vLLM plugin (group ``vllm.general_plugins``): runs in every vLLM process.

What it changes in vLLM 0.32.0, all of it here:

- ``vllm.v1.worker.gpu_model_runner.DraftModelProposer`` becomes ``SelfDraftProposer``
  (``CPUModelRunner`` inherits from that runner);
- ``vllm.v1.engine.core.EngineCore`` gains the methods in ``core_methods.py``;
- steps that draft nothing skip what only drafts need (``idle_speculation.py``);
- one CPU kernel is repaired (``kernel_repair.py``).

The scheduler and the worker extension are given to vLLM by name in its own arguments.
"""

from __future__ import annotations

import os

DISABLE_VARIABLE = "SLIPSTREAM_VLLM_PLUGIN"
"""Set to ``0`` to leave vLLM as it is (used by tests and by benchmarks of plain vLLM)."""


def register() -> None:
    """Check vLLM, then patch it. Idempotent.

    Raises:
        RuntimeError: this vLLM is not the one the plugin was written for.
    """
    if os.environ.get(DISABLE_VARIABLE) == "0":
        return
    import vllm
    from vllm.platforms import current_platform

    from rollout_server.engine.vllm_plugin.compatibility import (
        CPU_SYMBOLS,
        REQUIRED_SYMBOLS,
        check_compatibility,
    )

    is_cpu = current_platform.is_cpu()
    if not is_cpu:
        check_compatibility(vllm.__version__)
    else:
        check_compatibility(vllm.__version__, REQUIRED_SYMBOLS + CPU_SYMBOLS)
        from rollout_server.engine.vllm_plugin.kernel_repair import apply_kernel_repair

        apply_kernel_repair()

    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker import gpu_model_runner

    from rollout_server.drafter.proposer import SelfDraftProposer
    from rollout_server.engine.vllm_plugin import idle_speculation as idle
    from rollout_server.engine.vllm_plugin.core_methods import CORE_METHODS

    if hasattr(EngineCore, CORE_METHODS[0].__name__):
        return  # patched already: plugins may be loaded more than once in a process
    gpu_model_runner.DraftModelProposer = SelfDraftProposer
    for method in CORE_METHODS:
        setattr(EngineCore, method.__name__, method)
    runner = gpu_model_runner.GPUModelRunner
    EngineCore.post_step = idle.skip_empty_draft_exchange(EngineCore.post_step)
    runner._sample = idle.sample_plainly_without_drafts(runner._sample)
    runner.propose_draft_token_ids = idle.propose_nothing_without_preparation(
        runner.propose_draft_token_ids
    )
