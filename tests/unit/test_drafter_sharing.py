"""What counts as the drafter's own memory."""

from __future__ import annotations

import torch
from torch import nn

from rollout_server.drafter.sharing import num_unshared_bytes


def test_only_tensors_that_are_not_the_targets_count() -> None:
    target = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
    drafter = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
    assert num_unshared_bytes(drafter, target) == 4 * (8 + 2 + 2 + 2)
    drafter[1] = target[1]
    drafter[0].bias = target[0].bias
    assert num_unshared_bytes(drafter, target) == 4 * 8


def test_placeholders_hold_nothing_and_a_tied_tensor_counts_once() -> None:
    target = nn.Linear(4, 4)
    drafter = nn.Module()
    drafter.placeholder = nn.Parameter(torch.empty(100, 100, device="meta"))
    drafter.first = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    drafter.second = drafter.first
    drafter.register_buffer("table", torch.zeros(3))
    assert num_unshared_bytes(drafter, target) == 4 * 2 + 3 * 4
