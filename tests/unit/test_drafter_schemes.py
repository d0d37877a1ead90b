"""Round-to-nearest quantization, and which layers it applies to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.drafter.lag import WeightVersions, is_rebuild_due
from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan, resolve_scheme
from rollout_server.drafter.schemes import (
    WEIGHTS_AT_A_TIME,
    dequantize_int8,
    quantize_fp8_per_channel,
    quantize_int4_groups,
    quantize_int8_per_channel,
)
from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme


def test_int8_rounds_each_channel_to_its_own_scale() -> None:
    weight = torch.tensor([[127.0, -63.6, 0.4], [1.27, 0.006, -1.27]])
    quantized = quantize_int8_per_channel(weight)
    assert quantized.scales_N1.flatten().tolist() == pytest.approx([1.0, 0.01])
    assert quantized.values_NK.tolist() == [[127, -64, 0], [127, 1, -127]]


def test_a_channel_of_zeros_stays_zero_and_finite() -> None:
    quantized = quantize_int8_per_channel(torch.zeros(2, 4))
    assert dequantize_int8(quantized).tolist() == [[0.0] * 4] * 2
    assert quantized.scales_N1.flatten().tolist() == [1.0, 1.0], "kernels divide by the scale"


def test_the_given_weight_is_not_changed() -> None:
    weight = torch.randn(4, 8)
    before = weight.clone()
    quantize_int8_per_channel(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "quantize",
    [
        quantize_int8_per_channel,
        quantize_fp8_per_channel,
        partial(quantize_int4_groups, group_size=128, symmetric=True),
        partial(quantize_int4_groups, group_size=128, symmetric=False),
    ],
    ids=["int8", "fp8", "int4", "int4-asymmetric"],
)
def test_a_weight_quantized_in_pieces_is_what_its_parts_are(
    quantize: Callable[[torch.Tensor], Any],
) -> None:
    num_rows, num_columns = 300, 256
    assert num_rows * num_columns > WEIGHTS_AT_A_TIME["cpu"] > num_rows * num_columns // 2
    weight = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))
    whole, parts = quantize(weight), [quantize(half) for half in weight.split(num_rows // 2)]
    for field in fields(whole):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], torch.Tensor):
            expected = torch.cat([value.view(torch.uint8) for value in values])
            assert torch.equal(getattr(whole, field.name).view(torch.uint8), expected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(1e-6, 1e6))
def test_int8_error_is_at_most_half_a_step(seed: int, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 32, generator=generator) * magnitude
    quantized = quantize_int8_per_channel(weight)
    error = (dequantize_int8(quantized) - weight).abs()
    assert bool((error <= quantized.scales_N1 * 0.5001).all())
    assert quantized.values_NK.abs().max() == 127


def test_bfloat16_weights_quantize_like_their_float32_values() -> None:
    weight = torch.randn(4, 16).to(torch.bfloat16)
    quantized = quantize_int8_per_channel(weight)
    assert torch.equal(quantized.values_NK, quantize_int8_per_channel(weight.float()).values_NK)


def plan(**settings_: object) -> DrafterPlan:
    return DrafterPlan.from_config(
        DrafterConfig.model_validate(settings_), DeviceAbilities(device_type="cpu")
    )


def resolved(scheme: DrafterScheme, **device: object) -> DrafterScheme:
    return resolve_scheme(scheme, DeviceAbilities(**device))  # type: ignore[arg-type]


def test_auto_on_cpu_is_int8() -> None:
    assert resolved(DrafterScheme.AUTO, device_type="cpu") is DrafterScheme.INT8
    assert resolved(DrafterScheme.INT4, device_type="cpu") is DrafterScheme.INT4
    assert plan().scheme is DrafterScheme.INT8


@pytest.mark.parametrize(
    ("capability", "scheme"),
    [(75, DrafterScheme.INT8), (80, DrafterScheme.INT4), (90, DrafterScheme.INT4),
     (None, DrafterScheme.INT4)],
)  # fmt: skip
def test_auto_on_cuda_is_int4_where_the_device_has_bfloat16(
    capability: int | None, scheme: DrafterScheme
) -> None:
    device = {"device_type": "cuda", "compute_capability": capability}
    assert resolved(DrafterScheme.AUTO, **device) is scheme
    assert resolved(DrafterScheme.FP8, **device) is DrafterScheme.FP8


@pytest.mark.parametrize(
    ("target", "drafter", "every", "due"),
    [(0, 0, 1, False), (1, 0, 1, True), (1, 0, 2, False), (2, 0, 2, True), (3, 2, 2, False),
     (50, 0, 3, True)],
)  # fmt: skip
def test_a_drafter_is_rebuilt_before_it_falls_too_far_behind(
    target: int, drafter: int, every: int, due: bool
) -> None:
    assert is_rebuild_due(target, drafter, every) is due


def test_a_drafter_that_is_being_rebuilt_drafts_nothing() -> None:
    pair = WeightVersions(target=4, drafter=4)
    assert pair.may_draft(1)
    assert not replace(pair, is_rebuilding=True).may_draft(9)
    assert not replace(pair, target=5).may_draft(1)


def test_excluded_layers_and_the_shared_head_stay_the_targets() -> None:
    chosen = plan(exclude=[r"layers\.0\.", "down_proj"], quantize_lm_head=False)
    assert chosen.quantizes("draft_model.model.layers.1.mlp.gate_up_proj")
    assert not chosen.quantizes("draft_model.model.layers.0.mlp.gate_up_proj")
    assert not chosen.quantizes("model.layers.3.mlp.down_proj")
    assert not chosen.quantizes_lm_head()


def test_scheme_none_quantizes_nothing() -> None:
    chosen = plan(scheme="none")
    assert not chosen.quantizes("model.layers.1.mlp.gate_up_proj")
    assert not chosen.quantizes_lm_head()
