"""Entry point of the vLLM plugin (group ``vllm.general_plugins``): runs in every vLLM process.

What it changes in vLLM 0.32.0, all of it here:

- ``vllm.v1.worker.gpu_model_runner.DraftModelProposer`` becomes ``SelfDraftProposer``
  (``CPUModelRunner`` inherits from that runner);
- ``vllm.v1.engine.core.EngineCore`` gains the methods in ``core_methods.py``;
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
    from rollout_server.engine.vllm_plugin.core_methods import CORE_METHODS

    gpu_model_runner.DraftModelProposer = SelfDraftProposer
    for method in CORE_METHODS:
        setattr(EngineCore, method.__name__, method)
