"""Repairs one kernel of vLLM 0.32.0's CPU build, without which speculation is not lossless.

``vllm.utils.cpu_triton_utils._expand_kernel_impl`` converts its output to int64 before the C++
kernel writes it, so the kernel fills a temporary and the float output (per-token temperature,
top-k, top-p of the rejection sampler) stays uninitialised memory: at temperature > 0 target logits
become NaN. Greedy decoding does not show it.

Removal check: when ``tests/integration/test_kernel_repair.py::test_stock_kernel_is_still_broken``
fails, vLLM has fixed it and this file can go.
"""

from __future__ import annotations

import torch


def expand_kernel(
    output: torch.Tensor,  # [num_tokens]
    input_val: torch.Tensor,  # [batch_size]
    cu_num_tokens: torch.Tensor,  # [batch_size], inclusive cumulative counts
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value over its tokens, ``replace_from`` becoming ``replace_to``.

    Example: input [a, b], cumulative counts [2, 5] -> output [a, a, b, b, b].
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).to(torch.int64)
    values = torch.where(input_val == replace_from, replace_to, input_val).to(output.dtype)
    output.copy_(torch.repeat_interleave(values, counts))


def apply_kernel_repair() -> None:
    """Runs when plugins load: before ``WorkerWrapperBase.init_worker`` calls
    ``CpuPlatform.register_triton_kernel_overrides``, which reads this attribute."""
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = expand_kernel
