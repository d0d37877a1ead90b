"""Building the drafter from the target's parameters: what it takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Linear, Module, Parameter

from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan
from rollout_server.drafter.quantization import DraftLinearMethod
from rollout_server.drafter.target_packing import pack_from_target, unreadable_layers
from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme


class Model(Module):
    """Two layers under the names ``first`` and ``second``."""

    def __init__(self, first: Module, second: Module) -> None:
        super().__init__()
        self.first = first
        self.second = second


def drafter_layer(num_inputs: int, num_outputs: int) -> Module:
    """An empty layer with the drafter's int8 method, as vLLM builds it."""
    plan = DrafterPlan.from_config(
        DrafterConfig(scheme=DrafterScheme.INT8), DeviceAbilities(device_type="cpu")
    )
    layer: Module = Module()
    layer.quant_method = DraftLinearMethod(plan, "cpu", "layer")
    layer.quant_method.create_weights(
        layer,
        num_inputs,
        [num_outputs],
        num_inputs,
        num_outputs,
        torch.bfloat16,
        weight_loader=lambda param, weight: None,
    )
    return layer


def test_quantized_layers_are_packed_from_the_target_and_others_left_alone() -> None:
    target = Model(Linear(32, 64, bias=False), Linear(64, 32, bias=False)).to(torch.bfloat16)
    drafter = Model(drafter_layer(32, 64), Linear(64, 32, bias=False))
    untouched = drafter.second.weight.clone()
    assert pack_from_target(drafter, target) == 1
    method = drafter.first.quant_method
    assert method.num_packed == 1
    x = torch.randn(3, 32).to(torch.bfloat16)
    expected = target.first(x).float()
    error = (method.apply(drafter.first, x).float() - expected).norm() / expected.norm()
    assert error < 0.03
    assert torch.equal(drafter.second.weight, untouched)


def test_packing_again_follows_the_target() -> None:
    target = Model(Linear(32, 64, bias=False), Module()).to(torch.bfloat16)
    drafter = Model(drafter_layer(32, 64), Module())
    pack_from_target(drafter, target)
    target.first.weight.data.zero_()
    pack_from_target(drafter, target)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    assert drafter.first.quant_method.apply(drafter.first, x).abs().max() == 0


@pytest.mark.parametrize(
    "weight",
    [None, torch.zeros(64), torch.zeros(64, 32).to(torch.float8_e4m3fn)],
    ids=["absent", "not-a-matrix", "quantized"],
)
def test_a_target_whose_weights_cannot_be_read_is_refused_by_name(
    weight: torch.Tensor | None,
) -> None:
    target_layer = Module()
    if weight is not None:
        target_layer.weight = Parameter(weight, requires_grad=False)
    drafter = Model(drafter_layer(32, 64), Module())
    assert unreadable_layers(drafter, Model(target_layer, Module())) == ["first"]
    with pytest.raises(RuntimeError, match="target layer 'first'"):
        pack_from_target(drafter, Model(target_layer, Module()))
