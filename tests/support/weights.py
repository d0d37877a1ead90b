"""Weights with everything a quantizer may trip over."""

from __future__ import annotations

import torch


def awkward_weight(dtype: torch.dtype, num_rows: int, num_columns: int) -> torch.Tensor:
    """Random rows and every special case: zeros, one sign, exact ties, a lone outlier.

    Args:
        num_rows: at least 8.
        num_columns: at least 256.
    """
    weight = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[1] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    # Half levels of symmetric int4 (scale 2) and of int8 (scale 1): ties.
    weight[4] = torch.arange(num_columns) % 31 - 15
    weight[5] = (torch.arange(num_columns) % 255 - 127) / 2
    weight[5, 0] = 127
    weight[6, 7] = 50
    weight[7, : num_columns // 2] = 0
    return weight.to(dtype)
