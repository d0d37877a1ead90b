"""Which models can be served, and which can draft for themselves. Pure, over ``config.json``.

A rule is here because the thing cannot work, not because it is untried. Rules that only concern the
drafter do not apply with ``drafter.enabled: false``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import model_properties as properties
from shared.config.engine import DrafterConfig, EngineConfig
from shared.config.linear_layers import check_int4_groups
from shared.config.model_properties import Model
from shared.config.run import RunConfig
from shared.errors import ConfigurationError

WITHOUT_DRAFTER = "set drafter.enabled: false and speculation.mode: off to serve it as it is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One property of a model that rules something out."""

    finds: Callable[[Model], str | None]
    """What in the configuration shows it (``key value``), or None."""
    reason: str
    drafting_only: bool
    """True: the model can be served without a drafter."""


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        finds=properties.find_encoder_decoder,
        reason="an encoder-decoder model is no causal language model: rollouts continue a prompt",
        drafting_only=False,
    ),
    Refusal(
        finds=properties.find_multimodal,
        reason="prompts and weight pushes are those of a text model; "
        "give the text-only checkpoint (...ForCausalLM)",
        drafting_only=False,
    ),
    Refusal(
        finds=properties.find_no_generation,
        reason="a pooling, embedding or classification model samples no tokens; "
        "give a ...ForCausalLM checkpoint",
        drafting_only=False,
    ),
    Refusal(
        finds=properties.find_quantized_checkpoint,
        reason="pushes carry F32, BF16 or F16 tensors, which a quantized checkpoint has no place "
        "for, and the drafter is quantized from float weights; give the unquantized checkpoint",
        drafting_only=False,
    ),
    Refusal(
        finds=properties.find_bidirectional_attention,
        reason="only causal attention can continue a prompt token by token",
        drafting_only=False,
    ),
    Refusal(
        finds=properties.find_experts,
        reason="most of the bytes a step reads are experts, and vLLM 0.32.0 has no expert kernel "
        "for the drafter's schemes on every device (int8 on CPU needs AMX), so the drafter would "
        "read as much as the target and draft no faster",
        drafting_only=True,
    ),
    Refusal(
        finds=properties.find_recurrent_layers,
        reason="a recurrent state holds all tokens so far: what a rejected draft did to it cannot "
        "be overwritten as a KV slot can",
        drafting_only=True,
    ),
    Refusal(
        finds=properties.find_latent_attention,
        reason="latent attention (MLA) folds the float weight of kv_b_proj into its own at load, "
        "which a quantized drafter does not have, and vLLM 0.32.0 shares no KV cache of its layers",
        drafting_only=True,
    ),
    Refusal(
        finds=properties.find_mrope,
        reason="vLLM 0.32.0 has no multi-dimensional rotary positions (M-RoPE) in draft models",
        drafting_only=True,
    ),
    Refusal(
        finds=properties.find_layers_that_share_kv,
        reason="layers that read another layer's KV cache have none of their own to share with "
        "the drafter",
        drafting_only=True,
    ),
    Refusal(
        finds=properties.find_chunked_attention,
        reason="chunked local attention numbers its KV blocks anew at every chunk, and the "
        "drafter's one-token passes do not",
        drafting_only=True,
    ),
)


def check_configured_model(config: RunConfig) -> None:
    """``check_model_support`` of the model directory a configuration names, if it is there.

    Raises:
        ConfigurationError: as ``check_model_support``.
    """
    model = read_model_config(config.model.path)
    if model is not None:
        check_model_support(model, config.engine, config.drafter)


def check_model_support(model: Model, engine: EngineConfig, drafter: DrafterConfig) -> None:
    """Refuse what cannot work, before anything starts.

    Args:
        model: Hugging Face configuration, as in ``config.json``.

    Raises:
        ConfigurationError: naming what was found, why it cannot work and what to set.
    """
    overrides = engine.vllm_args.get("hf_overrides")
    if isinstance(overrides, Mapping):
        model = {**model, **overrides}
    for refusal in REFUSALS:
        if refusal.drafting_only and not drafter.enabled:
            continue
        found = refusal.finds(model)
        if found is None:
            continue
        if refusal.drafting_only:
            raise ConfigurationError(
                f"the model has {found} and cannot draft for itself: {refusal.reason}; "
                f"{WITHOUT_DRAFTER}",
                param="drafter.enabled",
            )
        raise ConfigurationError(
            f"the model has {found} and cannot be served: {refusal.reason}", param="model.path"
        )
    for size in sorted({engine.of_pool(pool).tensor_parallel_size for pool in engine.all_pools}):
        check_tensor_parallel_size(model, size)
        check_int4_groups(model, drafter, size)


def check_tensor_parallel_size(model: Model, tensor_parallel_size: int) -> None:
    """Every rank gets whole attention heads, for the target and for its drafter alike.

    Raises:
        ConfigurationError: the heads do not divide.
    """
    num_heads = model.get("num_attention_heads")
    if isinstance(num_heads, int) and num_heads % tensor_parallel_size:
        raise ConfigurationError(
            f"engine.tensor_parallel_size {tensor_parallel_size} does not divide the model's "
            f"{num_heads} attention heads",
            param="engine.tensor_parallel_size",
        )


def read_model_config(path: str) -> dict[str, Any] | None:
    """``config.json`` of a model directory; None when there is none here (a name on the hub).

    Raises:
        ConfigurationError: it is no JSON object.
    """
    file = Path(path) / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as exc:
        raise ConfigurationError(f"{file} is not valid JSON: {exc}", param="model.path") from exc
    if not isinstance(data, dict):
        raise ConfigurationError(f"{file} holds no JSON object", param="model.path")
    return data
