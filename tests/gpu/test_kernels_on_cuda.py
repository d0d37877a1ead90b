"""Each scheme's kernel on CUDA against the dequantized weight, and packing that keeps addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rollout_server.drafter.kernels.base import DraftKernel, LayerShape
from rollout_server.drafter.kernels.factory import make_draft_kernel
from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan
from rollout_server.drafter.schemes import dequantize_fp8, dequantize_int4, dequantize_int8
from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme

pytestmark = pytest.mark.gpu

SHAPES = [(512, 1024), (1024, 3584), (4096, 512)]
"""(input channels, output channels)."""
BATCHES = [1, 7, 64]
DEQUANTIZE: dict[DrafterScheme, Callable[[Any], torch.Tensor]] = {
    DrafterScheme.INT8: dequantize_int8,
    DrafterScheme.INT4: dequantize_int4,
    DrafterScheme.FP8: dequantize_fp8,
}
CASES = [
    # (scheme, int4 symmetric, kernels vLLM may not choose, relative error of a layer's output)
    # int8 and fp8 round the activations too: half a level of 127, and e4m3's three bits.
    pytest.param(DrafterScheme.INT8, True, "", 0.01, id="int8"),
    pytest.param(DrafterScheme.FP8, True, "", 0.04, id="fp8"),
    # int4 multiplies bfloat16: only the kernel's own rounding is left.
    pytest.param(DrafterScheme.INT4, True, "", 0.006, id="int4-first-choice"),
    pytest.param(DrafterScheme.INT4, True, "MacheteLinearKernel", 0.006, id="int4-marlin"),
    pytest.param(DrafterScheme.INT4, False, "", 0.006, id="int4-asymmetric"),
]


def make_kernel(
    scheme: DrafterScheme, symmetric: bool, num_inputs: int, num_outputs: int
) -> DraftKernel[Any]:
    plan = DrafterPlan.from_config(
        DrafterConfig(scheme=scheme, int4_symmetric=symmetric), DeviceAbilities(device_type="cuda")
    )
    shape = LayerShape(num_outputs=num_outputs, num_inputs=num_inputs, dtype=torch.bfloat16)
    return make_draft_kernel(plan, shape, "cuda")


def random_weight(num_inputs: int, num_outputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator, device="cuda")
    return (weight * 0.02).to(torch.bfloat16)


@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
@pytest.mark.parametrize(("scheme", "symmetric", "disabled", "tolerance"), CASES)
def test_kernel_equals_the_dequantized_weight_also_after_packing_again(
    monkeypatch: pytest.MonkeyPatch,
    scheme: DrafterScheme,
    symmetric: bool,
    disabled: str,
    tolerance: float,
    num_inputs: int,
    num_outputs: int,
) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", disabled)
    kernel = make_kernel(scheme, symmetric, num_inputs, num_outputs)
    bias = torch.randn(num_outputs, device="cuda").to(torch.bfloat16)
    addresses: list[int] = []
    for seed in (0, 1):
        weight_NK = random_weight(num_inputs, num_outputs, seed)
        kernel.pack(weight_NK)
        now = [tensor.data_ptr() for tensor in kernel.matmul.tensors()]
        assert now
        assert addresses in ([], now), "packing again must keep every address"
        addresses = now
        dequantized_NK = DEQUANTIZE[scheme](kernel.quantize(weight_NK))
        for batch in BATCHES:
            x = torch.randn(batch, num_inputs, device="cuda").to(torch.bfloat16)
            expected = x.float() @ dequantized_NK.t() + bias.float()
            error = (kernel.matmul.apply(x, bias).float() - expected).norm() / expected.norm()
            assert error < tolerance
