"""Quantizing straight into a CPU kernel's own layout: bit for bit what the long way gives."""

from __future__ import annotations

import pytest
import torch

from rollout_server.drafter.kernels import int4_vnni
from rollout_server.drafter.kernels.base import LayerShape, RowsKernel
from rollout_server.drafter.kernels.factory import make_draft_kernel
from rollout_server.drafter.kernels.int4_rows import Int4RowsMatmul
from rollout_server.drafter.kernels.int4_vnni import pack_for_vnni
from rollout_server.drafter.kernels.int8_rows import (
    PIECE_BYTES,
    Int8RowsMatmul,
    takes_int8_rows,
)
from rollout_server.drafter.plan import DrafterPlan
from rollout_server.drafter.schemes import quantize_int4_groups, quantize_int8_per_channel
from rollout_server.drafter.shards import shard_first_row, shard_names
from shared.config.engine import DrafterConfig
from tests.support.weights import awkward_weight

NUM_OUTPUTS, NUM_INPUTS = 64, 256
has_int8_rows = pytest.mark.skipif(
    not takes_int8_rows(LayerShape(num_outputs=32, num_inputs=32, dtype=torch.bfloat16)),
    reason="needs AVX-512 VNNI",
)
has_int4_rows = pytest.mark.skipif(not int4_vnni.is_available(), reason="needs AVX-512 VNNI")


def layer(dtype: torch.dtype = torch.bfloat16) -> LayerShape:
    return LayerShape(num_outputs=NUM_OUTPUTS, num_inputs=NUM_INPUTS, dtype=dtype)


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return awkward_weight(dtype, NUM_OUTPUTS, NUM_INPUTS)


@has_int4_rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_rows_are_the_references_codes_packed_the_plain_way(
    symmetric: bool, group_size: int, dtype: torch.dtype
) -> None:
    matmul = Int4RowsMatmul(layer(dtype), group_size=group_size, symmetric=symmetric)
    matmul.pack_rows(weight(dtype), 0)
    expected = pack_for_vnni(
        quantize_int4_groups(weight(dtype), group_size=group_size, symmetric=symmetric)
    )
    blocks, zeros, scales = matmul.tensors()
    assert torch.equal(blocks, expected.blocks)
    assert torch.equal(zeros, expected.zeros)
    assert torch.equal(scales, expected.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@has_int8_rows
def test_int8_rows_are_the_references_codes_as_vllm_packs_them(dtype: torch.dtype) -> None:
    matmul = Int8RowsMatmul(layer(dtype))
    matmul.pack_rows(weight(dtype), 0)
    expected = quantize_int8_per_channel(weight(dtype))
    packed, scales = matmul.tensors()
    assert torch.equal(packed, torch.ops._C.convert_weight_packed(expected.values_NK))
    assert torch.equal(scales, expected.scales_N1.flatten()), "a channel of zeros has scale 1"


@has_int8_rows
def test_a_layer_of_several_pieces_is_packed_whole() -> None:
    num_inputs = 2048
    num_outputs = 2 * PIECE_BYTES // num_inputs + 32
    big = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(1))
    matmul = Int8RowsMatmul(
        LayerShape(num_outputs=num_outputs, num_inputs=num_inputs, dtype=torch.float32)
    )
    matmul.pack_rows(big, 0)
    values = quantize_int8_per_channel(big).values_NK
    assert torch.equal(matmul.tensors()[0], torch.ops._C.convert_weight_packed(values))


@pytest.mark.parametrize("settings", [{"scheme": "int8"}, {"scheme": "int4"}])
@has_int8_rows
@has_int4_rows
def test_replaced_rows_are_new_and_the_others_untouched(settings: dict[str, str]) -> None:
    plan = DrafterPlan.from_config(DrafterConfig.model_validate(settings), "cpu")

    def packed(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        kernel = make_draft_kernel(plan, layer(), "cpu")
        assert isinstance(kernel, RowsKernel)
        kernel.pack(first)
        kernel.matmul.pack_rows(second, NUM_OUTPUTS - second.shape[0])
        return kernel.matmul.tensors()

    old = weight()
    new = old.flip(0).contiguous()
    mixed = torch.cat([old[:32], new[32:]])
    for found, expected in zip(packed(old, new[32:]), packed(mixed, mixed[32:]), strict=True):
        assert torch.equal(found, expected)


def test_shards_of_a_whole_layer_have_their_place_by_shard_id() -> None:
    rows = [64, 32, 32]
    places = [shard_first_row(key, (n, 16), rows, 16) for key, n in zip("qkv", rows, strict=True)]
    assert places == [0, 64, 96]
    assert shard_first_row(1, (32, 16), rows, 16) == 64
    assert shard_first_row(None, (128, 16), rows, 16) == 0


@pytest.mark.parametrize(
    ("key", "shape"),
    [("q", (128, 16)), (None, (64, 16)), ((0, 1), (96, 16)), ("x", (64, 16)), (3, (64, 16))],
)
def test_a_tensor_that_is_not_one_shard_has_no_place(key: object, shape: tuple[int, int]) -> None:
    assert shard_first_row(key, shape, [64, 32, 32], 16) is None


def test_the_shards_of_a_fused_layer_are_named_as_in_the_checkpoint() -> None:
    packed_modules = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert shard_names("model.layers.0.mlp.gate_up_proj", packed_modules) == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }
    assert shard_names("lm_head", packed_modules) == {"lm_head.weight"}


def test_the_int4_quantizer_leaves_the_threads_of_openmp_alone() -> None:
    # Numba's own threads would: a worker's target then ran on one core.
    import numba

    kernel = Int4RowsMatmul(
        LayerShape(num_outputs=64, num_inputs=128, dtype=torch.bfloat16),
        group_size=128,
        symmetric=True,
    )
    kernel.pack_rows(torch.randn(64, 128, dtype=torch.bfloat16), 0)
    with pytest.raises(ValueError, match="not initialized"):
        numba.threading_layer()
