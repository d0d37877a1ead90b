"""Makes vLLM build the drafter's linear layers quantized, fed by ordinary checkpoint weights.

The layers never hold a floating-point weight: ``weight`` is a placeholder on the meta device whose
loader collects the shards of one layer (q, k, v; gate, up; ...) in a staging tensor, quantizes it
when the last one has arrived, packs it and drops the staging tensor. Loading at start and
requantizing after a push are therefore the same code, and need one layer of extra memory.

Leans on (vLLM 0.32.0): ``LinearMethodBase``, ``QuantizationConfig.get_quant_method``,
``LinearBase.weight_loader`` and ``VocabParallelEmbedding.weight_loader`` (the v1 loaders, called as
``(param, loaded_weight[, shard_id])``), ``QuantizeMethodBase.tie_weights``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from rollout_server.drafter.kernels.base import LayerShape, RowsKernel, UnsupportedLayerError
from rollout_server.drafter.kernels.factory import (
    AnyDraftKernel,
    make_draft_kernel,
    slow_scheme_warning,
)
from rollout_server.drafter.plan import DrafterPlan
from rollout_server.drafter.shards import shard_first_row

LOGGER = logging.getLogger(__name__)


class SharedWithTargetMethod(LinearMethodBase):
    """A layer the drafter does not quantize: holds nothing, until ``sharing.py`` puts the target's
    own module in its place."""

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        data = torch.empty(shape, dtype=params_dtype, device="meta")
        placeholder = Parameter(data, requires_grad=False)
        set_weight_attrs(placeholder, {"weight_loader": self.load_nothing})
        layer.register_parameter("weight", placeholder)

    @staticmethod
    def load_nothing(*_: Any, **__: Any) -> None:
        """The target has loaded this weight."""

    def process_weights_after_loading(self, layer: Module) -> None:
        """Nothing was loaded."""

    def apply(
        self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise RuntimeError("a drafter layer was used before it was shared with the target")


class DraftLinearMethod(LinearMethodBase):
    """One quantized drafter layer (a linear layer or the LM head): a scheme's quantizer, the
    kernel of the scheme on the device, and the collecting of shards."""

    def __init__(self, plan: DrafterPlan, device_type: str, layer_name: str) -> None:
        self._plan = plan
        self._device_type = device_type
        self._layer_name = layer_name
        self.is_tied = False
        """LM head of a model with tied embeddings: fed by the embedding's weight."""
        self.num_packed = 0
        """How often the layer was packed: once at start, once per push."""

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = LayerShape(
            num_outputs=sum(output_partition_sizes),
            num_inputs=input_size_per_partition,
            dtype=params_dtype,
        )
        try:
            self._kernel: AnyDraftKernel = make_draft_kernel(self._plan, shape, self._device_type)
        except UnsupportedLayerError as exc:
            LOGGER.warning(
                "drafter layer %s is not quantized but shared with the target: %s",
                self._layer_name,
                exc,
            )
            self._share_instead(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
            return
        if self._kernel.note is not None:
            LOGGER.info("drafter layer %s: %s", self._layer_name, self._kernel.note)
        self.apply_quantized = self._kernel.matmul.apply
        self._shape = (sum(output_partition_sizes), input_size_per_partition)
        self._dtype = params_dtype
        self._partition_rows = output_partition_sizes
        # A rank that holds all of the layer can take its shards as they lie in the checkpoint.
        self._is_whole_layer = self._shape == (output_size, input_size)
        self._layer_loader = extra_weight_attrs.pop("weight_loader")
        self._attributes = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        self._staging: Parameter | None = None
        self._loaded_shards: set[Any] = set()
        placeholder = Parameter(
            torch.empty(self._shape, dtype=params_dtype, device="meta"), requires_grad=False
        )
        set_weight_attrs(placeholder, {**self._attributes, "weight_loader": self.load_shard})
        layer.register_parameter("weight", placeholder)

    @staticmethod
    def _share_instead(layer: Module, *sizes: Any, **extra_weight_attrs: Any) -> None:
        """No kernel takes the layer: ``layer`` gets another method, and this one is dropped."""
        shared = SharedWithTargetMethod()
        layer.quant_method = shared
        shared.create_weights(layer, *sizes, **extra_weight_attrs)

    def load_shard(
        self, param: Parameter, loaded_weight: torch.Tensor, *shard: Any, **shard_kwargs: Any
    ) -> None:
        """Weight loader of the placeholder; packs what is complete."""
        key = next(iter((*shard, *shard_kwargs.values())), None)
        if self._staging is None and self._pack_shard(loaded_weight, key):
            self._loaded_shards.add(key)
            if self._all_shards_loaded():
                self._finish()
            return
        if self._staging is None:
            if self._loaded_shards:
                raise RuntimeError(
                    f"drafter layer {self._layer_name}: shard {key!r} of shape "
                    f"{tuple(loaded_weight.shape)} does not go with the shards before it"
                )
            data = torch.empty(self._shape, dtype=self._dtype, device=self._device_type)
            self._staging = Parameter(data, requires_grad=False)
            set_weight_attrs(self._staging, self._attributes)
        self._layer_loader(self._staging, loaded_weight, *shard, **shard_kwargs)
        self._loaded_shards.add(key)
        if self._all_shards_loaded():
            self.pack(self._staging.data)

    def _pack_shard(self, loaded_weight: torch.Tensor, key: Any) -> bool:
        """Quantize a shard from where it lies, if the kernel takes rows and this rank all of it."""
        kernel = self._kernel
        if not isinstance(kernel, RowsKernel) or not self.takes_single_shards():
            return False
        first_row = shard_first_row(
            key, tuple(loaded_weight.shape), self._partition_rows, self._shape[1]
        )
        if first_row is None:
            return False
        kernel.matmul.pack_rows(loaded_weight, first_row)
        return True

    def _all_shards_loaded(self) -> bool:
        return None in self._loaded_shards or len(self._loaded_shards) == len(self._partition_rows)

    def _finish(self) -> None:
        self._staging = None
        self._loaded_shards.clear()
        self.num_packed += 1

    def pack(self, weight_NK: torch.Tensor) -> None:
        """Quantize this rank's complete weight [N, K] and put it in use."""
        self._kernel.pack(weight_NK)
        self._finish()

    def is_loading(self) -> bool:
        """True while some but not all shards of a layer have arrived."""
        return bool(self._loaded_shards)

    def takes_single_shards(self) -> bool:
        """Whether shards are packed one by one, so that a push may leave some of them out."""
        kernel = self._kernel
        return (
            self._is_whole_layer
            and isinstance(kernel, RowsKernel)
            and all(kernel.takes_rows(0, rows) for rows in self._partition_rows)
        )

    def quantizes_unrounded(self, num_rows: int) -> bool:
        """Whether checkpoint tensors of so many rows in all are quantized in their own dtype, from
        where they lie; else they are first collected (and padded) in the model's dtype."""
        return self.takes_single_shards() and num_rows == self._shape[0]

    def accept_missing_shards(self) -> bool:
        """End a partial push: the shards that did not come stay as they are.

        Returns:
            False when the layer collects shards in staging and cannot do without the others.
        """
        if self._staging is not None:
            return False
        if self._loaded_shards:
            self._finish()
        return True

    def drop_staging(self) -> None:
        """Forget a half-collected layer (a load failed)."""
        self._staging = None
        self._loaded_shards.clear()

    def packed_tensors(self) -> list[torch.Tensor]:
        """The kernel's own tensors; empty where it keeps them inside a library."""
        return self._kernel.matmul.tensors()

    def num_bytes(self) -> int:
        """Memory of the packed weight and scales."""
        return self._kernel.matmul.num_bytes()

    def apply(
        self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.apply_quantized(x, bias)

    def tie_weights(self, layer: Module, embed_tokens: Module) -> Module:
        # The embedding stays the target's; the head keeps its own quantized copy of it.
        self.is_tied = True
        return layer

    def process_weights_after_loading(self, layer: Module) -> None:
        """Nothing left to do: layers are packed as their last shard arrives."""


class DrafterQuantizationConfig(QuantizationConfig):
    """Chooses, layer by layer, what is quantized. Never registered by name: only the proposer
    hands it to vLLM, as the drafter's own ``quant_config``."""

    def __init__(self, plan: DrafterPlan, device_type: str) -> None:
        super().__init__()
        self._plan = plan
        self._device_type = device_type
        warning = slow_scheme_warning(plan.scheme, device_type)
        if warning is not None:
            LOGGER.warning(warning)

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            quantized = self._plan.quantizes_lm_head()
            return self._draft_method(prefix) if quantized else None
        if isinstance(layer, LinearBase):
            if self._plan.quantizes(prefix):
                return self._draft_method(prefix)
            return SharedWithTargetMethod()
        return None

    def _draft_method(self, layer_name: str) -> DraftLinearMethod:
        return DraftLinearMethod(self._plan, self._device_type, layer_name)

    def get_name(self) -> str:
        return "slipstream_drafter"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DrafterQuantizationConfig:
        raise ValueError("the drafter's quantization is not read from a checkpoint")
