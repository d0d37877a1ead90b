"""The CPU's int4 W4A8 kernel: its packing is vLLM's, its products are the weight's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types

from rollout_server.drafter.kernels import int4_vnni
from rollout_server.drafter.kernels.base import LayerShape, UnsupportedLayerError
from rollout_server.drafter.schemes import (
    dequantize_int4,
    quantize_int4_groups,
    unpack_int4_codes,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not int4_vnni.is_available(), reason="needs AVX-512 VNNI or AMX"),
]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_packed(values_RC: torch.Tensor) -> torch.Tensor:
    """Eight values a word along the columns, in the order of AWQ checkpoints."""
    rows, columns = values_RC.shape
    ordered = values_RC.to(torch.int32).view(rows, columns // 8, 8)[:, :, AWQ_ORDER]
    return pack_quantized_values_into_int32(ordered.reshape(rows, columns), scalar_types.uint4, 1)


def random_weight(num_outputs: int, num_inputs: int) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((96, 256), 128), ((64, 192), 64), ((32, 96), 32)]
)
def test_packing_is_what_vllm_makes_of_an_awq_checkpoint(
    shape: tuple[int, int], group_size: int, symmetric: bool
) -> None:
    weight = quantize_int4_groups(random_weight(*shape), group_size=group_size, symmetric=symmetric)
    zeros_NG = weight.zeros_NG
    if zeros_NG is None:
        zeros_NG = torch.full_like(weight.scales_NG, 8, dtype=torch.uint8)
    blocks, zeros, scales = ops.convert_weight_packed_scale_zp(
        awq_packed(unpack_int4_codes(weight).t()).contiguous(),
        awq_packed(zeros_NG.t()).contiguous(),
        weight.scales_NG.t().contiguous().to(torch.bfloat16),
        ops.CPUQuantAlgo.AWQ,
    )
    packed = int4_vnni.pack_for_vnni(weight)
    assert torch.equal(packed.blocks, blocks)
    assert torch.equal(packed.zeros, zeros)
    torch.testing.assert_close(packed.scales, scales, rtol=2**-8, atol=0)


@pytest.mark.parametrize("num_rows", [1, 4, 5, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_the_dequantized_weights_to_eight_bits(
    num_rows: int, dtype: torch.dtype
) -> None:
    weight = quantize_int4_groups(random_weight(64, 256), group_size=128, symmetric=True)
    shape = LayerShape(num_outputs=64, num_inputs=256, dtype=dtype)
    matmul = int4_vnni.VnniInt4Matmul(shape, group_size=128)
    matmul.pack(weight)
    x = torch.randn(num_rows, 256, dtype=dtype)
    bias = torch.randn(64, dtype=dtype)
    expected = x.float() @ dequantize_int4(weight).t() + bias.float()
    out = matmul.apply(x, bias)
    assert out.dtype is dtype
    assert ((out.float() - expected).norm() / expected.norm()) < 0.02


def test_a_quarter_of_the_bytes_and_a_little() -> None:
    weight = quantize_int4_groups(random_weight(512, 1024), group_size=128, symmetric=True)
    matmul = int4_vnni.VnniInt4Matmul(
        LayerShape(num_outputs=512, num_inputs=1024, dtype=torch.bfloat16), group_size=128
    )
    matmul.pack(weight)
    assert matmul.num_bytes() <= 0.29 * 512 * 1024 * 2


@pytest.mark.parametrize("shape", [(40, 128), (32, 96)])
def test_shapes_that_do_not_divide_are_refused(shape: tuple[int, int]) -> None:
    layer = LayerShape(num_outputs=shape[0], num_inputs=shape[1], dtype=torch.bfloat16)
    with pytest.raises(UnsupportedLayerError, match="no multiple of"):
        int4_vnni.VnniInt4Matmul(layer, group_size=128)
