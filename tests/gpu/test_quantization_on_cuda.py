"""The fused Triton quantizers against the plain ones, bit for bit, at sizes real layers have."""

from __future__ import annotations

import pytest
import torch

from rollout_server.drafter import triton_quantization
from rollout_server.drafter.schemes import quantize_int4_groups, quantize_int8_per_channel

pytestmark = pytest.mark.gpu

SHAPES = [(37, 256), (3584, 18944), (1024, 3072)]
"""(output channels, input channels)."""


def random_weight(shape: tuple[int, int]) -> torch.Tensor:
    """bfloat16 on the device, with a row of zeros and one of a single sign."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    weight = torch.randn(shape, generator=generator, device="cuda") * 0.02
    weight[1] = 0
    weight[2] = weight[2].abs()
    return weight.to(torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_codes_and_scales_equal_the_reference(shape: tuple[int, int]) -> None:
    weight_NK = random_weight(shape)
    found = triton_quantization.quantize_int8_per_channel_triton(weight_NK)
    expected = quantize_int8_per_channel(weight_NK.cpu())
    assert torch.equal(found.values_NK.cpu(), expected.values_NK)
    assert torch.equal(found.scales_N1.cpu(), expected.scales_N1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_words_scales_and_zeros_equal_the_reference(
    shape: tuple[int, int], group_size: int, symmetric: bool
) -> None:
    weight_NK = random_weight(shape)
    found = triton_quantization.quantize_int4_groups_triton(
        weight_NK, group_size=group_size, symmetric=symmetric
    )
    expected = quantize_int4_groups(weight_NK.cpu(), group_size=group_size, symmetric=symmetric)
    assert torch.equal(found.packed_NP.cpu(), expected.packed_NP)
    assert torch.equal(found.scales_NG.cpu(), expected.scales_NG)
    if symmetric:
        assert found.zeros_NG is None
    else:
        assert torch.equal(found.zeros_NG.cpu(), expected.zeros_NG)
