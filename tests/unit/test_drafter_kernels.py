"""Every scheme's matrix multiplication on this device against its own weight, multiplied plainly.

Tolerances are relative to the largest output: activations are rounded to 8 bits (1/254 of a token's
largest; int8, and int4 where the CPU has VNNI), to e4m3 (1/16 of each value at worst, averaged out
over the sum) or to bfloat16 (1/256).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rollout_server.drafter.kernels.base import DraftKernel, LayerShape, UnsupportedLayerError
from rollout_server.drafter.kernels.factory import (
    AnyDraftKernel,
    make_draft_kernel,
    slow_scheme_warning,
)
from rollout_server.drafter.kernels.int4 import Int4Matmul
from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan
from rollout_server.drafter.schemes import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    quantize_fp8_per_channel,
    quantize_int4_groups,
    quantize_int8_per_channel,
)
from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme

NUM_OUTPUTS, NUM_INPUTS = 96, 256
SCHEMES = {
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4"},
    "int4-g32": {"scheme": "int4", "int4_group_size": 32},
    "int4-asymmetric": {"scheme": "int4", "int4_symmetric": False},
    "int4-wna16": {"scheme": "int4"},
    "int4-wna16-asymmetric": {"scheme": "int4", "int4_symmetric": False},
    "fp8": {"scheme": "fp8"},
}
"""``int4`` is whatever the factory picks for this CPU, ``wna16`` is vLLM's kernel for any CPU."""
TOLERANCE = {"int8": 0.02, "int4": 0.02, "fp8": 0.04}


def make_kernel(
    name: str,
    dtype: torch.dtype,
    num_inputs: int = NUM_INPUTS,
    num_outputs: int = NUM_OUTPUTS,
) -> AnyDraftKernel:
    plan = DrafterPlan.from_config(
        DrafterConfig.model_validate(SCHEMES[name]), DeviceAbilities(device_type="cpu")
    )
    shape = LayerShape(num_outputs=num_outputs, num_inputs=num_inputs, dtype=dtype)
    if "wna16" not in name:
        return make_draft_kernel(plan, shape, "cpu")
    symmetric = plan.int4_symmetric
    return DraftKernel(
        quantize=partial(quantize_int4_groups, group_size=128, symmetric=symmetric),
        matmul=Int4Matmul(shape, group_size=128, symmetric=symmetric),
    )


def quantize(name: str, weight_NK: torch.Tensor) -> object:
    """The reference for what a kernel must have packed."""
    settings = DrafterConfig.model_validate(SCHEMES[name])
    if settings.scheme is DrafterScheme.INT8:
        return quantize_int8_per_channel(weight_NK)
    if settings.scheme is DrafterScheme.FP8:
        return quantize_fp8_per_channel(weight_NK)
    return quantize_int4_groups(
        weight_NK, group_size=settings.int4_group_size, symmetric=settings.int4_symmetric
    )


def dequantize(weight: object) -> torch.Tensor:
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight)
    if isinstance(weight, Int4Weight):
        return dequantize_int4(weight)
    assert isinstance(weight, Fp8Weight)
    return dequantize_fp8(weight)


def random_weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Off-centre groups, so that a wrong zero point shows.
    return torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator) * 0.1 + 0.03


def largest_relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_kernel_multiplies_by_the_weight_its_quantizer_made(
    name: str, dtype: torch.dtype, with_bias: bool
) -> None:
    kernel = make_kernel(name, dtype)
    kernel.pack(random_weight().to(dtype))
    plain = dequantize(quantize(name, random_weight().to(dtype)))
    bias = torch.linspace(-3, 3, NUM_OUTPUTS).to(dtype) if with_bias else None
    for num_rows in range(1, 18):
        x = torch.randn(num_rows, NUM_INPUTS, generator=torch.Generator().manual_seed(num_rows))
        out = kernel.matmul.apply(x.to(dtype), bias)
        expected = x.to(dtype).float() @ plain.t()
        if bias is not None:
            expected += bias.float()
        assert out.shape == (num_rows, NUM_OUTPUTS)
        assert out.dtype is dtype
        assert largest_relative_error(out, expected) < TOLERANCE[name.split("-")[0]]


@pytest.mark.parametrize("name", SCHEMES)
def test_more_rows_than_the_scratch_holds_and_more_dimensions_are_fine(name: str) -> None:
    kernel = make_kernel(name, torch.bfloat16)
    kernel.pack(random_weight())
    x = torch.randn(2, 70, NUM_INPUTS).to(torch.bfloat16)
    out = kernel.matmul.apply(x, None)
    assert out.shape == (2, 70, NUM_OUTPUTS)
    torch.testing.assert_close(out[1, 69:], kernel.matmul.apply(x[1, 69:], None))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_second_pack_is_used_in_the_buffers_of_the_first(name: str) -> None:
    kernel = make_kernel(name, torch.bfloat16)
    x = torch.randn(3, NUM_INPUTS).to(torch.bfloat16)
    kernel.pack(random_weight(seed=1))
    addresses = [tensor.data_ptr() for tensor in kernel.matmul.tensors()]
    num_bytes = kernel.matmul.num_bytes()
    before = kernel.matmul.apply(x, None)
    kernel.pack(random_weight(seed=2))

    fresh = make_kernel(name, torch.bfloat16)
    fresh.pack(random_weight(seed=2))
    assert torch.equal(kernel.matmul.apply(x, None), fresh.matmul.apply(x, None))
    assert not torch.equal(kernel.matmul.apply(x, None), before)
    assert [tensor.data_ptr() for tensor in kernel.matmul.tensors()] == addresses
    assert kernel.matmul.num_bytes() == num_bytes
    assert addresses


WITH_AMX_BYTES = 9 if torch.cpu._is_amx_tile_supported() else None
"""Of a group: there vLLM keeps a scale in float32, a zero point and a compensation term."""


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"),
    [
        ("int8", 1 + 8 / 256),  # scale and compensation term
        ("int4-wna16", 0.5 + (WITH_AMX_BYTES or 2) / 128),
        ("int4-wna16-asymmetric", 0.5 + (WITH_AMX_BYTES or 2.5) / 128),
        ("fp8", 1 + 4 / 256),
    ],
)
def test_bytes_are_those_of_codes_and_scales(name: str, bytes_per_weight: float) -> None:
    kernel = make_kernel(name, torch.bfloat16)
    kernel.pack(random_weight())
    assert kernel.matmul.num_bytes() == NUM_OUTPUTS * NUM_INPUTS * bytes_per_weight


@pytest.mark.parametrize(("num_inputs", "group_size"), [(192, 64), (96, 32), (384, 128)])
def test_int4_takes_the_largest_group_that_divides_the_layer(
    num_inputs: int, group_size: int
) -> None:
    kernel = make_kernel("int4", torch.bfloat16, num_inputs=num_inputs)
    kernel.pack(torch.randn(NUM_OUTPUTS, num_inputs))
    *_, scales = kernel.matmul.tensors()
    assert scales.numel() == NUM_OUTPUTS * num_inputs // group_size
    assert (kernel.note is None) == (group_size == 128)
    if kernel.note is not None:
        assert f"groups of {group_size}" in kernel.note
        assert "no multiple of the group size 128" in kernel.note


@pytest.mark.parametrize(
    ("num_inputs", "num_outputs", "reason"),
    [
        (72, 96, "72 input channels"),
        (256, 40, "output channels|Output size"),
        (256, 44, "output channels|Output size"),
    ],
)
@pytest.mark.parametrize("name", ["int4", "int4-wna16"])
def test_a_layer_no_int4_kernel_takes_is_refused_with_the_reason(
    name: str, num_inputs: int, num_outputs: int, reason: str
) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        make_kernel(name, torch.bfloat16, num_inputs=num_inputs, num_outputs=num_outputs)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_int8_and_fp8_take_any_shape_on_cpu(name: str) -> None:
    kernel = make_kernel(name, torch.bfloat16, num_inputs=77, num_outputs=45)
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(45, 77, generator=generator)
    kernel.pack(weight_NK)
    x = torch.randn(5, 77, generator=generator).to(torch.bfloat16)
    plain = dequantize(quantize(name, weight_NK))
    error = largest_relative_error(kernel.matmul.apply(x, None), x.float() @ plain.t())
    assert error < TOLERANCE[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_token_of_zeros_gives_zeros(name: str) -> None:
    kernel = make_kernel(name, torch.float32)
    kernel.pack(random_weight())
    assert torch.equal(
        kernel.matmul.apply(torch.zeros(1, NUM_INPUTS), None), torch.zeros(1, NUM_OUTPUTS)
    )


def test_schemes_that_save_no_time_on_the_device_say_so() -> None:
    assert "slower than plain decoding" in (slow_scheme_warning(DrafterScheme.FP8, "cpu") or "")
    assert slow_scheme_warning(DrafterScheme.INT8, "cpu") is None


def test_a_device_without_kernels_is_an_error_that_names_it() -> None:
    plan = DrafterPlan.from_config(DrafterConfig(), DeviceAbilities(device_type="cpu"))
    shape = LayerShape(num_outputs=32, num_inputs=32, dtype=torch.float32)
    with pytest.raises(ValueError, match="no kernel for device 'xpu'"):
        make_draft_kernel(plan, shape, "xpu")
