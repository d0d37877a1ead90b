"""Models that are only a shape: ``config.json``, and weights vLLM makes up (format ``dummy``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    # For dry runs: the code paths of the others in seconds.
    "tiny-tied": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
}
"""Qwen3-0.6B, Qwen2.5-7B, and a tiny one of each."""
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def write_shape(directory: Path, name: str) -> Path:
    """``config.json`` of a shape; returns the model directory.

    Raises:
        KeyError: no such shape.
    """
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **SHAPES[name]}
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def vocab_size(name: str) -> int:
    """Of a shape."""
    return int(SHAPES[name]["vocab_size"])
