"""The one vLLM kernel the plugin repairs: ours is right, the stock one still is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

STOCK_KERNEL_PROBE = """
import torch
import vllm._custom_ops
from vllm.utils.cpu_triton_utils import _expand_kernel_impl
output = torch.full((5,), -1.0)
_expand_kernel_impl(output, torch.tensor([0.5, 0.7]), torch.tensor([2, 5], dtype=torch.int32), 0, 1)
print("OUTPUT", output.tolist())
"""


def test_repaired_kernel_repeats_each_value_over_its_tokens() -> None:
    kernel_repair = pytest.importorskip("rollout_server.engine.vllm_plugin.kernel_repair")
    output = torch.full((6,), float("nan"))
    cumulative = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    values = torch.tensor([0.5, 9.0, 0.0, 0.7])
    kernel_repair.expand_kernel(output, values, cumulative, 0, 1)
    assert output.tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0, 1.0, 0.7])


def test_repaired_kernel_keeps_integer_outputs() -> None:
    kernel_repair = pytest.importorskip("rollout_server.engine.vllm_plugin.kernel_repair")
    output = torch.zeros(3, dtype=torch.int32)
    kernel_repair.expand_kernel(
        output, torch.tensor([20, -1], dtype=torch.int32), torch.tensor([1, 3]), -1, 32
    )
    assert output.tolist() == [20, 32, 32]


@pytest.mark.slow
@pytest.mark.engine
def test_stock_kernel_is_still_broken() -> None:
    """When this fails, vLLM has fixed its kernel: remove ``kernel_repair.py``."""
    environment = {**os.environ, "SLIPSTREAM_VLLM_PLUGIN": "0"}
    result = subprocess.run(
        [sys.executable, "-c", STOCK_KERNEL_PROBE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("OUTPUT")]
    assert line == "OUTPUT [-1.0, -1.0, -1.0, -1.0, -1.0]"
