"""Chooses quantizer and kernel of one drafter layer. The kernels are vLLM's.

A layer that no kernel of the scheme takes never stops the engine: int4 tries smaller groups, and
what is left raises ``UnsupportedLayerError``, upon which the drafter uses the target's own layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from vllm.platforms import current_platform

from rollout_server.drafter.fast_quantization import quantize_int4, quantize_int8
from rollout_server.drafter.kernels import int4_vnni
from rollout_server.drafter.kernels.base import (
    DraftKernel,
    LayerShape,
    RowsKernel,
    UnsupportedLayerError,
)
from rollout_server.drafter.kernels.fp8 import CutlassFp8Matmul, PlainFp8Matmul, has_fast_fp8
from rollout_server.drafter.kernels.int4 import Int4Matmul
from rollout_server.drafter.kernels.int4_rows import Int4RowsMatmul
from rollout_server.drafter.kernels.int8 import CudaInt8Matmul, OnednnInt8Matmul
from rollout_server.drafter.kernels.int8_rows import Int8RowsMatmul, takes_int8_rows
from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan
from shared.types import DrafterScheme

INT4_GROUP_SIZES = (128, 64, 32)

AnyDraftKernel = DraftKernel[Any] | RowsKernel


def make_draft_kernel(plan: DrafterPlan, shape: LayerShape, device_type: str) -> AnyDraftKernel:
    """The quantizer and kernel for one layer.

    Raises:
        UnsupportedLayerError: no kernel of the scheme takes a layer of this shape.
        ValueError: the scheme has no kernel on this device, whatever the shape.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"drafter.scheme {plan.scheme} has no kernel for device {device_type!r}")
    makers: dict[DrafterScheme, Callable[[], AnyDraftKernel]] = {
        DrafterScheme.INT8: partial(_int8, shape, device_type),
        DrafterScheme.INT4: partial(_int4, plan, shape, device_type),
        DrafterScheme.FP8: partial(_fp8, shape, device_type),
    }
    if plan.scheme not in makers:
        raise ValueError(f"drafter.scheme {plan.scheme} quantizes nothing")
    return makers[plan.scheme]()


def compute_capability(device_type: str) -> int | None:
    """Of the CUDA device, as 80 for 8.0; None on CPU."""
    capability = current_platform.get_device_capability() if device_type == "cuda" else None
    return None if capability is None else int(capability.to_int())


def device_abilities(device_type: str) -> DeviceAbilities:
    """Of the device of this process."""
    return DeviceAbilities(
        device_type=device_type,
        compute_capability=compute_capability(device_type),
    )


def _int8(shape: LayerShape, device_type: str) -> AnyDraftKernel:
    if device_type == "cpu" and takes_int8_rows(shape):
        return RowsKernel(matmul=Int8RowsMatmul(shape))
    matmul: OnednnInt8Matmul | CudaInt8Matmul
    if device_type == "cpu":
        matmul = OnednnInt8Matmul(shape)
    else:
        matmul = CudaInt8Matmul(shape, compute_capability=compute_capability(device_type))
    return DraftKernel(quantize=quantize_int8, matmul=matmul)


def _int4(plan: DrafterPlan, shape: LayerShape, device_type: str) -> AnyDraftKernel:
    wanted = plan.int4_group_size
    reasons: list[str] = []
    for group_size in (size for size in INT4_GROUP_SIZES if size <= wanted):
        try:
            kernel = _int4_in_groups(shape, device_type, group_size, plan.int4_symmetric)
        except UnsupportedLayerError as exc:
            reasons.append(f"groups of {group_size}: {exc}")
            continue
        note = f"int4 groups of {group_size} ({'; '.join(reasons)})" if reasons else None
        return replace(kernel, note=note)
    raise UnsupportedLayerError("; ".join(reasons))


def _int4_in_groups(
    shape: LayerShape, device_type: str, group_size: int, symmetric: bool
) -> AnyDraftKernel:
    if device_type == "cpu" and int4_vnni.is_available():
        rows = Int4RowsMatmul(shape, group_size=group_size, symmetric=symmetric)
        return RowsKernel(matmul=rows)
    matmul = Int4Matmul(shape, group_size=group_size, symmetric=symmetric)
    quantize = partial(quantize_int4, group_size=group_size, symmetric=symmetric)
    return DraftKernel(quantize=quantize, matmul=matmul)


def _fp8(shape: LayerShape, device_type: str) -> AnyDraftKernel:
    matmul_class = CutlassFp8Matmul if has_fast_fp8(device_type) else PlainFp8Matmul
    return RowsKernel(matmul=matmul_class(shape))


def slow_scheme_warning(scheme: DrafterScheme, device_type: str) -> str | None:
    """Why drafting with a scheme does not pay on this device, for the log; None where it does."""
    if scheme is DrafterScheme.FP8 and not has_fast_fp8(device_type):
        return (
            "drafter.scheme fp8 has no fast kernel on this device (CUDA needs sm89 or newer): "
            "drafting will be slower than plain decoding. Use int8 or auto"
        )
    if device_type == "cpu" and scheme is DrafterScheme.INT4 and not int4_vnni.is_available():
        return (
            "drafter.scheme int4 is no faster than bfloat16 on a CPU without AVX-512 VNNI or AMX: "
            "drafting saves no time. Use int8 or auto"
        )
    return None
