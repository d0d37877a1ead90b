"""Sizes of a decoder as its ``config.json`` gives them, and how many weights they make. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared.config import model_properties as properties
from shared.config.model_properties import Model
from shared.errors import ConfigurationError

MODEL_TYPES_WITH_QKV_BIAS = frozenset({"qwen2"})
"""Their configuration does not say so."""
NOT_COUNTED: tuple[Callable[[Model], str | None], ...] = (
    properties.find_experts,
    properties.find_recurrent_layers,
    properties.find_latent_attention,
    properties.find_layers_that_share_kv,
)
"""Models whose layers are not the ones counted here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLayer:
    """One linear layer as vLLM has it: q, k and v fused, gate and up fused."""

    name: str
    num_outputs: int
    num_inputs: int

    @property
    def num_weights(self) -> int:
        return self.num_outputs * self.num_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder with a gated MLP: Llama, Mistral, Qwen 2 and 3, and what is built like them."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False

    @property
    def layer_linears(self) -> tuple[LinearLayer, ...]:
        """The linear layers of one decoder layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_heads * self.head_dim
        return (
            LinearLayer(name="qkv_proj", num_outputs=self.qkv_width, num_inputs=hidden),
            LinearLayer(name="o_proj", num_outputs=hidden, num_inputs=queries),
            LinearLayer(name="gate_up_proj", num_outputs=2 * inner, num_inputs=hidden),
            LinearLayer(name="down_proj", num_outputs=hidden, num_inputs=inner),
        )

    @property
    def lm_head(self) -> LinearLayer:
        return LinearLayer(name="lm_head", num_outputs=self.vocab_size, num_inputs=self.hidden_size)

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """All of them; a tied LM head counts once."""
        embeddings = self.lm_head.num_weights * (1 if self.has_tied_embeddings else 2)
        per_layer = sum(linear.num_weights for linear in self.layer_linears)
        per_layer += 2 * self.hidden_size  # the two norms
        if self.has_qkv_bias:
            per_layer += self.qkv_width
        return embeddings + self.num_layers * per_layer + self.hidden_size


def model_shape(model: Model) -> ModelShape:
    """The shape of a Hugging Face configuration.

    Raises:
        ConfigurationError: a size is missing, or the model has parts that are not counted here.
    """
    for find in NOT_COUNTED:
        found = find(model)
        if found is not None:
            raise ConfigurationError(
                f"the model has {found}, which this arithmetic does not count: start one engine "
                "and read its log, which has the KV blocks and the drafter's size",
                param="model.path",
            )
    hidden, heads = _size(model, "hidden_size"), _size(model, "num_attention_heads")
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=_size(model, "intermediate_size"),
        num_layers=_size(model, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(model, "num_key_value_heads", default=heads),
        head_dim=_size(model, "head_dim", default=hidden // heads),
        vocab_size=_size(model, "vocab_size"),
        has_tied_embeddings=bool(model.get("tie_word_embeddings")),
        has_qkv_bias=bool(model.get("attention_bias"))
        or model.get("model_type") in MODEL_TYPES_WITH_QKV_BIAS,
    )


def _size(model: Model, key: str, default: int | None = None) -> int:
    value = model.get(key)
    if isinstance(value, int) and value > 0:
        return value
    if value is None and default is not None:
        return default
    raise ConfigurationError(
        f"config.json has {key} {value!r}: a positive number is needed", param="model.path"
    )
