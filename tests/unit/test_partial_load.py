"""From changed tensors to the modules that must be loaded again."""

from __future__ import annotations

import torch

from rollout_server.engine.vllm_plugin.partial_load import touched_modules


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(4, 12)
        self.o_proj = torch.nn.Linear(4, 4, bias=False)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])


class Model(torch.nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.norm = torch.nn.LayerNorm(4)


AVAILABLE = [
    *(
        f"layers.{i}.{part}_proj.{leaf}"
        for i in (0, 1)
        for part in "qkv"
        for leaf in ("weight", "bias")
    ),
    *(f"layers.{i}.o_proj.weight" for i in (0, 1)),
    "layers.0.experts.0.weight",
    "norm.weight",
]


def test_a_fused_module_takes_all_of_its_parts_and_biases() -> None:
    model = Model()
    touched = touched_modules(model, ["layers.1.k_proj.weight", "norm.weight"], AVAILABLE)
    assert touched is not None
    assert touched.module_names == {"layers.1.qkv_proj", "norm"}
    assert touched.modules == [model.layers[1].qkv_proj, model.norm]
    expected = {f"layers.1.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias")}
    assert touched.tensor_names == expected | {"norm.weight"}


def test_nothing_changed_touches_nothing() -> None:
    touched = touched_modules(Model(), [], AVAILABLE)
    assert touched is not None
    assert (touched.modules, touched.tensor_names) == ([], frozenset())


def test_names_the_model_does_not_know_and_modules_of_modules_ask_for_everything() -> None:
    assert touched_modules(Model(), ["transformer.h.0.attn.weight"], AVAILABLE) is None
    assert touched_modules(Model(), ["layers.0.experts.weight"], AVAILABLE) is None
