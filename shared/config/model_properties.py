"""What a model's ``config.json`` says about it: one finder per property. Pure.

A finder returns what shows the property (``key value``, for a message), or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Model = Mapping[str, Any]
"""A Hugging Face configuration, as in ``config.json``."""

EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "ssm", "kda")
RECURRENT_KEYS = (
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_num_heads",
    "ssm_state_size",
    "hybrid_override_pattern",
    "linear_num_key_heads",
    "linear_attn_config",
    "attn_type_list",
    "conv_L_cache",
    "lru_width",
)
RECURRENT_MODEL_TYPES = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})
OTHER_TEXT_MODELS = frozenset(
    {
        "ChatGLMModel",
        "ChatGLMForConditionalGeneration",
        "GPT2LMHeadModel",
        "InklingForConditionalGeneration",
    }
)
"""vLLM 0.32.0's text-generation models whose names do not say ``ForCausalLM``."""
MULTIMODAL_KEYS = ("vision_config", "audio_config", "speech_config", "thinker_config")


def find_encoder_decoder(model: Model) -> str | None:
    return "is_encoder_decoder true" if model.get("is_encoder_decoder") else None


def find_no_generation(model: Model) -> str | None:
    names = [str(name) for name in model.get("architectures") or ()]
    if not names or any("ForCausalLM" in name or name in OTHER_TEXT_MODELS for name in names):
        return None
    return f"architectures {', '.join(names)}"


def find_multimodal(model: Model) -> str | None:
    for name in model.get("architectures") or ():
        if "ForConditionalGeneration" in name and name not in OTHER_TEXT_MODELS:
            return f"architectures {name}"
    return next((key for key in MULTIMODAL_KEYS if model.get(key)), None)


def find_quantized_checkpoint(model: Model) -> str | None:
    found = model.get("quantization_config") or model.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
    return f"quantization_config.quant_method {method}"


def find_bidirectional_attention(model: Model) -> str | None:
    if model.get("use_bidirectional_attention"):
        return f"use_bidirectional_attention {model['use_bidirectional_attention']}"
    return "is_causal false" if model.get("is_causal") is False else None


def find_experts(model: Model) -> str | None:
    places = [model, model.get("ffn_config")]  # the latter: DBRX
    for place in places:
        for key in EXPERT_COUNTS:
            count = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(count, int) and count > 1:
                return f"{key} {count}"
    return None


def find_recurrent_layers(model: Model) -> str | None:
    if model.get("model_type") in RECURRENT_MODEL_TYPES:
        return f"model_type {model['model_type']}"
    for key in ("layer_types", "layers_block_type", "block_types"):
        for kind in model.get(key) or ():
            if kind in RECURRENT_LAYERS:
                return f"{key} with {kind}"
    return next((key for key in RECURRENT_KEYS if model.get(key)), None)


def find_latent_attention(model: Model) -> str | None:
    rank = model.get("kv_lora_rank")
    return None if rank is None else f"kv_lora_rank {rank}"


def find_mrope(model: Model) -> str | None:
    for key in ("rope_parameters", "rope_scaling"):
        settings = model.get(key)
        if isinstance(settings, Mapping) and settings.get("mrope_section"):
            return f"{key}.mrope_section"
    return None


def find_layers_that_share_kv(model: Model) -> str | None:
    count = model.get("num_kv_shared_layers")
    return f"num_kv_shared_layers {count}" if count else None


def find_chunked_attention(model: Model) -> str | None:
    size = model.get("attention_chunk_size")
    return f"attention_chunk_size {size}" if size else None
