"""The quantizers of ``schemes.py``, with a fused kernel where the weight lies on a GPU.

On CPU the rows kernels (``kernels/int8_rows.py``, ``kernels/int4_rows.py``) quantize for
themselves; what no such kernel takes goes through the reference.
"""

from __future__ import annotations

import torch

from rollout_server.drafter.schemes import (
    Int4Weight,
    Int8Weight,
    quantize_int4_groups,
    quantize_int8_per_channel,
)


def quantize_int8(weight_NK: torch.Tensor) -> Int8Weight:
    """As ``quantize_int8_per_channel``."""
    if weight_NK.is_cuda:
        # Imported where it is used: on CPU Triton has no backend.
        from rollout_server.drafter.triton_quantization import (
            quantize_int8_per_channel_triton,
        )

        return quantize_int8_per_channel_triton(weight_NK)
    return quantize_int8_per_channel(weight_NK)


def quantize_int4(weight_NK: torch.Tensor, *, group_size: int, symmetric: bool) -> Int4Weight:
    """As ``quantize_int4_groups``."""
    if weight_NK.is_cuda:
        from rollout_server.drafter.triton_quantization import (
            quantize_int4_groups_triton,
        )

        return quantize_int4_groups_triton(weight_NK, group_size=group_size, symmetric=symmetric)
    return quantize_int4_groups(weight_NK, group_size=group_size, symmetric=symmetric)
