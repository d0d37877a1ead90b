"""Replaces a vLLM model's weights by a file's, in place. Generation must be paused.

Leans on (vLLM 0.32.0): ``initialize_layerwise_reload`` and ``finalize_layerwise_processing``
(in-place reload that packs layer by layer); ``UnquantizedLinearMethod``, which leaves an empty
``weight`` where ``layer.cpu_linear`` holds what oneDNN packed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_processing,
    initialize_layerwise_reload,
)

from rollout_server.engine.vllm_plugin.checkpoint import iterate_safetensors, tensor_names
from rollout_server.engine.vllm_plugin.embeddings import (
    is_loaded_in_place,
    is_token_embedding,
    pack_again,
)
from rollout_server.engine.vllm_plugin.expert_repair import repack_experts
from rollout_server.engine.vllm_plugin.padded_rows import pad_rows
from rollout_server.engine.vllm_plugin.partial_load import touched_modules


def load_target(
    model: Any,
    path: str,
    changed: list[str] | None,
    model_config: Any,
    loaded: Collection[str] = (),
) -> None:
    """Load a file's tensors; only those modules that ``changed`` touches, where it is given.

    Args:
        loaded: tensors whose modules have them already, all of each.

    Raises:
        RuntimeError: a layer has no weight any more. After any error the model is a mixture.
    """
    available = tensor_names(path)
    # Multi-head latent attention computes more weights when all of a model is loaded.
    wanted = None if model_config.use_mla else changed
    if loaded:
        wanted = sorted(set(available if changed is None else changed).difference(loaded))
    touched = None if wanted is None else touched_modules(model, wanted, available)
    if touched is None:
        released = release_packed(model)
        pad_rows(model)
        initialize_layerwise_reload(model)
        model.load_weights(iterate_safetensors(path))
        # An LM head with a weight of its own was packed on the way.
        filled = [module for module in model.modules() if is_token_embedding(module)]
    else:
        reloaded = [module for module in touched.modules if not is_loaded_in_place(module)]
        released = [layer for module in reloaded for layer in release_packed(module)]
        for module in reloaded:
            pad_rows(module)
            initialize_layerwise_reload(module)
        model.load_weights(iterate_safetensors(path, touched.tensor_names))
        filled = [module for module in touched.modules if is_loaded_in_place(module)]
    finalize_layerwise_processing(model, model_config)
    pack_again(model, filled)
    if touched is None:
        repack_experts(model)  # packed again only if they were loaded again
    check_packed(model, released)


def release_packed(model: Module) -> list[Any]:
    """Free what is packed of the linear layers below: what is packed next can lie in its memory,
    which then goes neither to the kernel nor comes from it. Returns the layers."""
    released = []
    for layer in model.modules():
        if (
            type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod
            and getattr(layer, "cpu_linear", None) is not None
            and layer.weight.numel() == 0
        ):
            layer.cpu_linear = None
            released.append(layer)
    return released


def check_packed(model: Module, released: Collection[Module]) -> None:
    """
    Raises:
        RuntimeError: naming the layers that were released and not packed again.
    """
    unpacked = {layer for layer in released if getattr(layer, "cpu_linear", None) is None}
    names = [name for name, layer in model.named_modules() if layer in unpacked]
    if names:
        raise RuntimeError(f"the file has no weight for {', '.join(names)}")
