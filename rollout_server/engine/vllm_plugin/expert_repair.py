"""Repairs vLLM's in-place reload of experts on CPU.

``UnquantizedFusedMoEMethod`` packs experts for the CPU's grouped matrix multiplication only the
first time they are loaded. A reload leaves them unpacked under a kernel that takes them for packed:
wrong output, no error.

Leans on (vLLM 0.32.0): ``UnquantizedFusedMoEMethod.moe_kernel`` and its ``fused_experts``, of class
``CPUUnquantizedExperts``, whose ``process_weights_after_loading`` packs.

Removal check: the mixtures of experts in ``tests/integration/test_architectures.py``.
"""

from __future__ import annotations

from torch.nn import Module
from vllm.platforms import current_platform


def repack_experts(model: Module) -> None:
    """After a reload: pack every mixture-of-experts layer again. Does nothing off the CPU."""
    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(experts, CPUUnquantizedExperts):
            experts.process_weights_after_loading(layer)
