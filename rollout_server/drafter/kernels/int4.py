"""vLLM's int4 W4A16 matrix multiplications: CPU WNA16, and Machete or Marlin on CUDA.

A kernel takes its weight from a module with compressed-tensors parameters and repacks them into
its own layout. After a push a second such module is filled and repacked, and its values are copied
into the first one's tensors: addresses stay, and the extra memory is one layer.

Leans on (vLLM 0.32.0): ``choose_mp_linear_kernel``, ``MPLinearLayerConfig``,
``MPLinearKernel.process_weights_after_loading`` and ``apply_weights`` (which read ``bias`` and
leave ``use_w4a8`` on the module), ``BasevLLMParameter``, ``pack_quantized_values_into_int32``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
)
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.scalar_type import scalar_types

from rollout_server.drafter.kernels.base import (
    LayerShape,
    UnsupportedLayerError,
    num_tensor_bytes,
)
from rollout_server.drafter.schemes import INT4_CODES_PER_WORD, Int4Weight

WEIGHT, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"


class _PackedParameter(BasevLLMParameter):
    """A finished tensor in the parameter type kernels insist on, without a loader and ranks."""

    def __init__(self, data: torch.Tensor, *, packed_dim: int | None = None) -> None:
        # BasevLLMParameter's own __init__ sets up loading, which has happened already.
        self.input_dim, self.output_dim = 1, 0
        if packed_dim is not None:
            self.packed_dim = packed_dim


class Int4Matmul:
    """int4 weights in groups of input channels; activations stay in half precision.

    On a CPU this is no faster than bfloat16 (measured) and serves only where ``int4_vnni`` cannot.
    """

    def __init__(self, shape: LayerShape, *, group_size: int, symmetric: bool) -> None:
        """
        Raises:
            UnsupportedLayerError: with every kernel's reason not to take the shape.
        """
        num_outputs, num_inputs = shape.num_outputs, shape.num_inputs
        if num_inputs % group_size:
            raise UnsupportedLayerError(
                f"{num_inputs} input channels are no multiple of the group size {group_size}"
            )
        if not symmetric and num_outputs % INT4_CODES_PER_WORD:
            raise UnsupportedLayerError(
                f"{num_outputs} output channels are no multiple of {INT4_CODES_PER_WORD}"
            )
        self._shape = shape
        # A rank quantizes its own part: for the kernel that part is the whole layer.
        config = MPLinearLayerConfig(
            full_weight_shape=(num_inputs, num_outputs),
            partition_weight_shape=(num_inputs, num_outputs),
            weight_type=scalar_types.uint4b8 if symmetric else scalar_types.uint4,
            act_type=shape.kernel_dtype,
            group_size=group_size,
            zero_points=not symmetric,
        )
        try:
            kernel_class = choose_mp_linear_kernel(config)
        except ValueError as exc:
            raise UnsupportedLayerError(" ".join(str(exc).split())) from exc
        self._kernel = kernel_class(config, WEIGHT, SCALE, ZERO_POINT)
        self._holder: Module | None = None

    def pack(self, weight: Int4Weight) -> None:
        packed = self._repacked(weight)
        if self._holder is None:
            self._holder = packed
            return
        for old, new in zip(_tensors(self._holder), _tensors(packed), strict=True):
            old.copy_(new)

    def _repacked(self, weight: Int4Weight) -> Module:
        """The weight in the kernel's own layout."""
        holder: Any = Module()
        holder.bias = None  # kernels would permute it; ours is the target's own tensor
        holder.register_parameter(WEIGHT, _PackedParameter(weight.packed_NP, packed_dim=1))
        scales_NG = weight.scales_NG.to(self._shape.kernel_dtype)
        holder.register_parameter(SCALE, _PackedParameter(scales_NG))
        if weight.zeros_NG is not None:
            zeros = pack_quantized_values_into_int32(
                weight.zeros_NG.to(torch.int32), scalar_types.uint4, packed_dim=0
            )
            holder.register_parameter(ZERO_POINT, _PackedParameter(zeros, packed_dim=0))
        self._kernel.process_weights_after_loading(holder)
        packed: Module = holder
        return packed

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert self._holder is not None, "drafter layer used before its weight was packed"
        x_half = x.to(self._shape.kernel_dtype)
        if x_half is x and not getattr(self._holder, "use_w4a8", False):
            out: torch.Tensor = self._kernel.apply_weights(self._holder, x, bias)
            return out
        # The bias keeps its precision: float32 models, and AMX kernels that want it in float32.
        out = self._kernel.apply_weights(self._holder, x_half, None).to(x.dtype)
        return out if bias is None else out.add_(bias)

    def tensors(self) -> list[torch.Tensor]:
        return [] if self._holder is None else _tensors(self._holder)

    def num_bytes(self) -> int:
        return num_tensor_bytes(self.tensors())


def _tensors(holder: Module) -> list[torch.Tensor]:
    """Everything a kernel left on the module, in the order it was registered."""
    return [parameter.data for parameter in holder.parameters()] + list(holder.buffers())
