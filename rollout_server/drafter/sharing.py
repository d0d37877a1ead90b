"""Gives the drafter (a vLLM model) the target's own tensors and KV cache.

Only quantized weights are its own.

Leans on (vLLM 0.32.0): ``Attention.kv_sharing_target_layer_name``, read by
``GPUModelRunner.get_kv_cache_spec`` (a layer that names a target gets no KV of its own and is bound
to the target's) and by ``Attention.forward`` (a layer that names a target does not write KV).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from rollout_server.drafter.plan import DRAFT_PREFIX
from rollout_server.drafter.quantization import DraftLinearMethod


def draft_linear_methods(drafter: Module) -> dict[str, DraftLinearMethod]:
    """Every quantized layer of the drafter by module name."""
    return {
        name: module.quant_method
        for name, module in drafter.named_modules()
        if isinstance(getattr(module, "quant_method", None), DraftLinearMethod)
    }


def token_embedding(model: Module) -> tuple[str, Module]:
    """Name and module of the token embedding, with which a tied LM head shares its weight.

    Llama and most others call it ``model.embed_tokens``, GPT-2 ``transformer.wte``, OPT
    ``model.decoder.embed_tokens``.

    Raises:
        RuntimeError: the model has none, or several.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    if len(found) != 1:
        raise RuntimeError(f"the model has {len(found)} token embeddings, one was expected")
    return found[0]


def share_target_modules(drafter: Module, target: Module) -> None:
    """Replace everything that is not quantized by the target's own modules and tensors.

    Whole modules for embeddings, the unquantized LM head and excluded linear layers (on CPU their
    weight lives packed inside the module, not in a tensor); parameters and buffers for norms and
    biases. vLLM reloads weights in place, so what is shared stays current.

    Raises:
        RuntimeError: the target has no module of the same name.
    """
    target_modules = dict(target.named_modules())
    for name, module in list(drafter.named_modules()):
        if name not in target_modules:
            raise RuntimeError(f"drafter module {name!r} has no counterpart in the target")
        counterpart = target_modules[name]
        quantized = isinstance(getattr(module, "quant_method", None), DraftLinearMethod)
        if isinstance(module, LinearBase | VocabParallelEmbedding) and not quantized:
            parent_name, _, attribute = name.rpartition(".")
            setattr(drafter.get_submodule(parent_name), attribute, counterpart)
            continue
        for tensor_name, parameter in counterpart.named_parameters(recurse=False):
            if tensor_name in module._parameters and not (quantized and tensor_name == "weight"):
                module._parameters[tensor_name] = parameter
        for tensor_name, buffer in counterpart.named_buffers(recurse=False):
            if tensor_name in module._buffers:
                module._buffers[tensor_name] = buffer


def num_unshared_bytes(drafter: Module, target: Module) -> int:
    """Bytes of the drafter's parameters and buffers that are not the target's own tensors.

    Placeholders on the meta device hold nothing; packed weights are counted by their layers.
    """
    addresses = {tensor.data_ptr() for tensor in (*target.parameters(), *target.buffers())}
    own = {
        id(tensor): tensor.numel() * tensor.element_size()
        for tensor in (*drafter.parameters(), *drafter.buffers())
        if not tensor.is_meta and tensor.data_ptr() not in addresses
    }
    return sum(own.values())


def point_at_target_kv_cache(attention_layers: dict[str, Any], draft_names: Iterable[str]) -> None:
    """Before KV allocation: draft layers name the target layer whose cache they use."""
    for name in draft_names:
        attention_layers[name].kv_sharing_target_layer_name = name.removeprefix(DRAFT_PREFIX)


def allow_provisional_writes(attention_layers: dict[str, Any], draft_names: Iterable[str]) -> None:
    """After KV allocation: with no target named, draft layers write their provisional keys and
    values into the shared cache. Verification overwrites every one of those slots."""
    for name in draft_names:
        attention_layers[name].kv_sharing_target_layer_name = None
