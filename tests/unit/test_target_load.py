"""What a reload does around vLLM's own: rows with room between them, and what is packed when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor

from rollout_server.engine.vllm_plugin import padded_rows
from rollout_server.engine.vllm_plugin.embeddings import pack_again, pack_when_used
from rollout_server.engine.vllm_plugin.padded_rows import is_worth_padding, pad_rows
from rollout_server.engine.vllm_plugin.target_load import check_packed, release_packed

SHAPE = (1024, 2048)
"""Outputs and inputs: too large for vLLM's kernel of small layers, rows of 4 KiB."""


class Layer(torch.nn.Module):
    """A linear layer as vLLM's CPU build leaves it, once it is packed."""

    def __init__(self, shape: tuple[int, int] = SHAPE) -> None:
        super().__init__()
        self.quant_method: Any = UnquantizedLinearMethod()
        full = torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)
        full.__dict__["note"] = "kept"
        get_layerwise_info(self).restore_metadata = ({"weight": to_meta_tensor(full)}, {})
        self.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
        self.cpu_linear: Any = lambda x, weight, bias: x


def meta_weight(layer: torch.nn.Module) -> torch.Tensor:
    return get_layerwise_info(layer).restore_metadata[0]["weight"]


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        (SHAPE, torch.bfloat16, True),
        ((1024, 4096), torch.float32, True),
        ((1024, 2048 + 32), torch.bfloat16, False),  # no multiple of a kilobyte
        ((8, 2048), torch.bfloat16, False),  # vLLM has a kernel of its own for small ones, on AMX
    ],
)
def test_which_layers_are_padded(
    shape: tuple[int, int], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padded_rows, "check_cpu_sgl_kernel", lambda n, k, dtype: n < 1024)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    assert is_worth_padding(weight) is expected
    assert not is_worth_padding(weight.t())
    assert not is_worth_padding(weight[None])


def test_a_reload_puts_a_layer_together_in_padded_rows_again_and_again() -> None:
    model = torch.nn.Sequential(Layer(), Layer())
    for _ in range(2):
        pad_rows(model)
        weight = materialize_meta_tensor(meta_weight(model[1]))
        assert (weight.shape, weight.stride()) == (SHAPE, (2048 + 32, 1))
        assert isinstance(weight, torch.nn.Parameter)
        assert weight.__dict__["note"] == "kept"


def test_other_layers_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    layer.quant_method = object()
    pad_rows(layer)
    assert meta_weight(layer).is_contiguous()
    layer = Layer()
    monkeypatch.setattr(padded_rows, "is_packed_by_onednn", lambda: False)
    pad_rows(layer)
    assert meta_weight(layer).is_contiguous()


def test_onednn_packs_the_same_from_padded_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator).to(torch.bfloat16)
    padded = torch.empty_strided(SHAPE, padded_rows.padded_stride(weight), dtype=weight.dtype)
    padded.copy_(weight)
    identity = torch.eye(SHAPE[1], dtype=torch.bfloat16)
    read_back = ops.onednn_mm(ops.create_onednn_mm(padded.t(), 32), identity, None).t()
    assert torch.equal(read_back, weight)


def test_what_is_packed_is_freed_and_must_be_there_again_at_the_end() -> None:
    model = torch.nn.Sequential(Layer(), Layer(), Layer())
    unpacked, other = model[1], model[2]
    unpacked.weight = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    other.quant_method = object()
    released = release_packed(model)
    assert released == [model[0]]
    assert model[0].cpu_linear is None
    assert unpacked.cpu_linear is not None, "its weight is beside"
    assert other.cpu_linear is not None
    with pytest.raises(RuntimeError, match=r"no weight for 0$"):
        check_packed(model, released)
    model[0].cpu_linear = torch.nn.functional.linear
    check_packed(model, released)


def test_an_embedding_is_packed_by_the_first_that_multiplies_with_it() -> None:
    packed = []

    def process(method: UnquantizedEmbeddingMethod, layer: Any) -> None:
        packed.append(layer)
        layer.cpu_linear = torch.nn.functional.linear

    layer = SimpleNamespace(weight=torch.eye(3), cpu_linear=None)
    pack_when_used(process)(UnquantizedEmbeddingMethod(), layer)
    assert packed == []
    for _ in range(2):
        assert torch.equal(layer.cpu_linear(torch.ones(1, 3), layer.weight, None), torch.ones(1, 3))
        assert packed == [layer]


class Embedding(VocabParallelEmbedding):
    """Of vLLM's class, without what that asks of a process around it."""

    def __init__(self, weight: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.quant_method: Any = UnquantizedEmbeddingMethod()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.cpu_linear: Any = "packed of the old weight"


def test_what_shares_a_weight_that_was_filled_is_packed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[Any] = []
    monkeypatch.setattr(
        UnquantizedEmbeddingMethod,
        "process_weights_after_loading",
        lambda method, layer: packed.append((layer, layer.cpu_linear)),
    )
    filled, head, other = Embedding(torch.eye(3)), Embedding(torch.eye(3)), Embedding(torch.eye(3))
    head.weight = filled.weight
    model = torch.nn.ModuleList([filled, head, other, torch.nn.Linear(2, 2)])
    pack_again(model, [filled, model[3]])
    assert packed == [(filled, None), (head, None)], "freed first"
    assert other.cpu_linear == "packed of the old weight"
