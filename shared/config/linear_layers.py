"""Input channels of a model's linear layers, as each tensor-parallel rank has them. Pure, over
``config.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.config.engine import DrafterConfig
from shared.config.model_properties import Model
from shared.errors import ConfigurationError
from shared.types import DrafterScheme

INT4_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearInputs:
    """Layers whose inputs have one size."""

    num_channels: int
    """Of one rank."""
    comes_from: str
    """The setting of the model, and what divides it."""
    modules: tuple[str, ...]
    """Their names in a layer amid the others, for the common families."""


def linear_inputs(model: Model, tensor_parallel_size: int) -> list[LinearInputs]:
    """One entry a size; what the configuration does not say is left out.

    Layers that widen the hidden state are split by outputs, those that come back to it by inputs.
    """
    hidden = _first_int(model, "hidden_size", "n_embd", "d_model")
    heads = _first_int(model, "num_attention_heads", "n_head")
    inner = _first_int(model, "intermediate_size", "ffn_dim", "n_inner")
    if inner is None and hidden is not None and "n_embd" in model:
        inner = 4 * hidden
    middle = (_first_int(model, "num_hidden_layers", "n_layer") or 1) // 2
    attention, mlp = f"model.layers.{middle}.self_attn", f"model.layers.{middle}.mlp"
    found = []
    if hidden is not None:
        modules = (f"{attention}.qkv_proj", f"{mlp}.gate_up_proj", "lm_head")
        found.append(
            LinearInputs(num_channels=hidden, comes_from=f"hidden_size {hidden}", modules=modules)
        )
    if hidden is not None and heads is not None:
        head_dim = _first_int(model, "head_dim") or hidden // heads
        found.append(
            LinearInputs(
                num_channels=heads * head_dim // tensor_parallel_size,
                comes_from=f"{heads} heads of {head_dim}{_over_ranks(tensor_parallel_size)}",
                modules=(f"{attention}.o_proj",),
            )
        )
    if inner is not None:
        found.append(
            LinearInputs(
                num_channels=inner // tensor_parallel_size,
                comes_from=f"intermediate_size {inner}{_over_ranks(tensor_parallel_size)}",
                modules=(f"{mlp}.down_proj",),
            )
        )
    return found


def check_int4_groups(model: Model, drafter: DrafterConfig, tensor_parallel_size: int) -> None:
    """Whoever asks for int4 gets the groups they asked for, in every layer.

    ``auto`` is not checked: it takes smaller groups, or the target's own layer, where it must.

    Raises:
        ConfigurationError: naming the layer, its size and what to set.
    """
    if not drafter.enabled or drafter.scheme is not DrafterScheme.INT4:
        return
    exclude = [re.compile(pattern) for pattern in drafter.exclude]
    if not drafter.quantize_lm_head:
        exclude.append(re.compile("^lm_head$"))
    quantized = [
        (inputs, leaves)
        for inputs in linear_inputs(model, tensor_parallel_size)
        if (leaves := _quantized_leaves(inputs.modules, exclude))
    ]
    for inputs, leaves in quantized:
        if inputs.num_channels % drafter.int4_group_size == 0:
            continue
        fitting = [
            size
            for size in INT4_GROUP_SIZES
            if not any(other.num_channels % size for other, _ in quantized)
        ]
        remedy = (
            f"set drafter.int4_group_size: {fitting[0]}"
            if fitting
            else f"no group size does: leave such layers to the target with drafter.exclude "
            f"[{leaves[0]}], or set drafter.scheme: int8"
        )
        raise ConfigurationError(
            f"drafter.int4_group_size {drafter.int4_group_size} does not divide the "
            f"{inputs.num_channels} input channels of {', '.join(leaves)} "
            f"({inputs.comes_from}); {remedy}",
            param="drafter.int4_group_size",
        )


def _quantized_leaves(modules: tuple[str, ...], exclude: Sequence[re.Pattern[str]]) -> list[str]:
    return [
        module.rpartition(".")[2]
        for module in modules
        if not any(pattern.search(module) for pattern in exclude)
    ]


def _over_ranks(tensor_parallel_size: int) -> str:
    if tensor_parallel_size == 1:
        return ""
    return f" over engine.tensor_parallel_size {tensor_parallel_size}"


def _first_int(model: Model, *keys: str) -> int | None:
    return next((model[key] for key in keys if isinstance(model.get(key), int)), None)
