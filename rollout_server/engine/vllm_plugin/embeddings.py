"""Token embeddings and LM heads of vLLM on a CPU: packed where they multiply, filled in place.

vLLM packs a copy of every embedding for oneDNN, also of those that only look rows up: a gigabyte
for a vocabulary of 152,000 and a hidden size of 3584. Here a token embedding is packed when
something first multiplies with it, which nothing does where the LM head is a module of its own.

A reload of vLLM's puts an embedding together beside the one it has and copies it over. It keeps its
layout, so its loader can as well fill it where it lies; what is packed of it is then packed anew.

Leans on (vLLM 0.32.0): ``UnquantizedEmbeddingMethod.process_weights_after_loading``, which packs on
a CPU and does nothing elsewhere; ``layer.cpu_linear`` as set by ``dispatch_cpu_unquantized_gemm``;
``VocabParallelEmbedding.weight_loader``, which fills all of a parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

Process = Callable[[UnquantizedEmbeddingMethod, Any], None]
"""``process_weights_after_loading``, unbound."""


def pack_when_used(process: Process) -> Process:
    """Wrap ``process``: token embeddings are packed by the first multiplication with them."""

    @functools.wraps(process)
    def wrapped(method: UnquantizedEmbeddingMethod, layer: Any) -> None:
        if isinstance(layer, ParallelLMHead) or layer.weight.is_meta:
            process(method, layer)
        else:
            layer.cpu_linear = functools.partial(_pack_and_multiply, process, method, layer)

    return wrapped


def _pack_and_multiply(
    process: Process,
    method: UnquantizedEmbeddingMethod,
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    process(method, layer)
    product: torch.Tensor = layer.cpu_linear(x, weight, bias)
    return product


def is_loaded_in_place(module: Module) -> bool:
    """Whether the module's loader may fill its weight where it lies."""
    return type(getattr(module, "quant_method", None)) is UnquantizedEmbeddingMethod


def is_token_embedding(module: Module) -> bool:
    """Whether the module looks rows up, and is no LM head."""
    return isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)


def pack_again(model: Module, loaded: Collection[Module]) -> None:
    """After a load: pack embeddings and LM heads whose weight was filled.

    A tied LM head gets no weight of its own in a reload, so vLLM leaves alone what it packed from
    the old embedding.

    Args:
        loaded: modules that were loaded; those that share a weight with one of them are packed too.

    Removal check: the tied case of ``tests/integration/test_weight_push_engine.py``.
    """
    addresses = {module.weight.data_ptr() for module in loaded if is_loaded_in_place(module)}
    for module in model.modules():
        if not isinstance(module, VocabParallelEmbedding) or not is_loaded_in_place(module):
            continue
        if module.weight.data_ptr() in addresses:
            module.cpu_linear = None  # first: the new form can lie where the old one was
            module.quant_method.process_weights_after_loading(module)
