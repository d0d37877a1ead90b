"""Tiny random models of every architecture the drafter is tried on, float32.

All share the vocabulary and tokenizer of ``tests/support/models.py``. Layer sizes are multiples of
128, so that int4 groups of 128 fit. Sliding windows are shorter than the tests' sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import CONTEXT_LENGTH, VOCAB_SIZE, save_tokenizer

SLIDING_WINDOW = 24
WEIGHT_STD = 0.12
"""Large enough that int8 rounding changes some of the drafter's choices."""

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One maker of tiny models."""

    name: str
    model_type: str
    """Hugging Face's name of the architecture."""
    tied: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    """What differs from ``DENSE``."""
    embedding_scale: float = 1.0
    """Gemma multiplies embeddings by sqrt(hidden size): a random one with a tied head would say
    the same token for ever, so its embedding is made smaller and its last norm larger."""

    def __call__(self, path: Path, *, seed: int, **overrides: Any) -> Path:
        """Write a random model to ``path``: same seed, same weights.

        Args:
            overrides: configuration values of Hugging Face that win over the architecture's own.
        """
        config = self.config(**overrides)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        spread_weights(model, self.embedding_scale)
        model.save_pretrained(path)
        save_tokenizer(path)
        return path

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """Its Hugging Face configuration."""
        settings = {
            **DENSE,
            "tie_word_embeddings": self.tied,
            "initializer_range": WEIGHT_STD,
            **dict(self.settings),
            **overrides,
        }
        return CONFIG_MAPPING[self.model_type](**settings)


@torch.no_grad()
def spread_weights(model: PreTrainedModel, embedding_scale: float) -> None:
    """Give biases and norms values that matter: Hugging Face starts them at 0 and 1, where a test
    would not notice that they were left out. Experts are stacked, so they are no linear layers."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * WEIGHT_STD)
        elif parameter.dim() == 3:
            parameter.normal_(std=WEIGHT_STD)
    if embedding_scale != 1.0:
        model.get_input_embeddings().weight.mul_(embedding_scale)
        model.get_submodule("model.norm").weight.add_(1 / embedding_scale)


def architecture(
    name: str,
    model_type: str,
    *,
    tied: bool = False,
    embedding_scale: float = 1.0,
    **settings: Any,
) -> Architecture:
    """``settings`` are Hugging Face's."""
    return Architecture(
        name=name,
        model_type=model_type,
        tied=tied,
        embedding_scale=embedding_scale,
        settings=tuple(settings.items()),
    )


LLAMA = architecture("llama", "llama")
MISTRAL = architecture("mistral", "mistral", sliding_window=SLIDING_WINDOW)
QWEN2 = architecture("qwen2", "qwen2", tied=True)
"""Qwen 2 and 2.5: biases on q, k and v."""
QWEN3 = architecture("qwen3", "qwen3", tied=True)
GEMMA = architecture("gemma", "gemma", tied=True, embedding_scale=0.1)
GEMMA2 = architecture(
    "gemma2",
    "gemma2",
    tied=True,
    embedding_scale=0.02,
    sliding_window=SLIDING_WINDOW,
    query_pre_attn_scalar=32,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=10.0,
)
"""Every other layer has a sliding window; attention and output logits are soft-capped."""
GEMMA3 = architecture(
    "gemma3",
    "gemma3_text",
    tied=True,
    embedding_scale=0.02,
    sliding_window=SLIDING_WINDOW,
    query_pre_attn_scalar=32,
    layer_types=["sliding_attention", "full_attention"],
)
"""Sliding and full layers, each kind with its own rotary embedding."""
PHI3 = architecture("phi3", "phi3")
"""q, k, v and gate, up are fused in the checkpoint too."""
OLMO2 = architecture("olmo2", "olmo2")
"""Runs on vLLM's Transformers backend, which replaces layers of Hugging Face's own model."""
GPT2 = architecture(
    "gpt2",
    "gpt2",
    tied=True,
    n_embd=128,
    n_inner=256,
    n_layer=2,
    n_head=4,
    n_positions=CONTEXT_LENGTH,
    num_key_value_heads=4,
)
"""Learned positions, layer norms, weights stored transposed, other names for everything."""
OPT = architecture(
    "opt",
    "opt",
    tied=True,
    ffn_dim=256,
    word_embed_proj_dim=128,
    num_key_value_heads=4,
    init_std=WEIGHT_STD,
)
"""Learned positions with an offset, layer norms, biases; vLLM gives its head no quantization."""
QWEN3_MOE = architecture(
    "qwen3_moe",
    "qwen3_moe",
    moe_intermediate_size=128,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
)
MIXTRAL = architecture("mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2)

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3)
"""Those that draft. The proof of losslessness runs over all of them."""
MORE_ARCHITECTURES: tuple[Architecture, ...] = (PHI3, OLMO2, GPT2, OPT)
"""These draft too; the long form of ``test_architectures.py`` has them, the proof has not."""
MIXTURES_OF_EXPERTS: tuple[Architecture, ...] = (QWEN3_MOE, MIXTRAL)
