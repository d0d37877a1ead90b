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

from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from rollout_server.drafter.kernels import make_int8_matmul
from rollout_server.drafter.plan import DrafterPlan
from rollout_server.drafter.schemes import quantize_int8_per_channel


class DraftLinearMethod(LinearMethodBase):
    """Weight handling of one quantized drafter layer (a linear layer or the LM head)."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
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
        self._matmul = make_int8_matmul(self._device_type, params_dtype)
        self._shape = (sum(output_partition_sizes), input_size_per_partition)
        self._dtype = params_dtype
        self._num_partitions = len(output_partition_sizes)
        self._layer_loader = extra_weight_attrs.pop("weight_loader")
        self._attributes = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        self._staging: Parameter | None = None
        self._loaded_shards: set[Any] = set()
        placeholder = Parameter(
            torch.empty(self._shape, dtype=params_dtype, device="meta"), requires_grad=False
        )
        set_weight_attrs(placeholder, {**self._attributes, "weight_loader": self.load_shard})
        layer.register_parameter("weight", placeholder)

    def load_shard(
        self, param: Parameter, loaded_weight: torch.Tensor, *shard: Any, **shard_kwargs: Any
    ) -> None:
        """Weight loader of the placeholder; packs when the layer is complete."""
        if self._staging is None:
            data = torch.empty(self._shape, dtype=self._dtype, device=self._device_type)
            self._staging = Parameter(data, requires_grad=False)
            set_weight_attrs(self._staging, self._attributes)
        self._layer_loader(self._staging, loaded_weight, *shard, **shard_kwargs)
        self._loaded_shards.add(shard or tuple(shard_kwargs.values()) or None)
        whole = None in self._loaded_shards or (None,) in self._loaded_shards
        if whole or len(self._loaded_shards) == self._num_partitions:
            staging, self._staging = self._staging, None
            self._loaded_shards.clear()
            self.pack(staging.data)

    def pack(self, weight_NK: torch.Tensor) -> None:
        """Quantize this rank's complete weight [N, K] and put it in use."""
        self._matmul.pack(quantize_int8_per_channel(weight_NK))
        self.num_packed += 1

    def is_loading(self) -> bool:
        """True while some but not all shards of a layer have arrived."""
        return self._staging is not None

    def drop_staging(self) -> None:
        """Forget a half-collected layer (a load failed)."""
        self._staging = None
        self._loaded_shards.clear()

    def num_bytes(self) -> int:
        """Memory of the packed weight and scales."""
        return self._matmul.num_bytes()

    def apply(
        self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._matmul.apply(x, bias)

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

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            return DraftLinearMethod(self._device_type) if self._plan.quantizes_lm_head() else None
        if isinstance(layer, LinearBase):
            if self._plan.quantizes(prefix):
                return DraftLinearMethod(self._device_type)
            return UnquantizedLinearMethod()  # gives way to the target's own module
        return None

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
