"""The models that can be made: architecture sizes and what they are for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from shared.errors import ConfigurationError

SMALL_ALPHABET = "0123456789+-*=; ans"
FULL_ALPHABET = "0123456789+-*/=;:.,()?! \nabcdefghijklmnopqrstuvwxyz"


class Preset(StrEnum):
    """Names accepted by ``slipstream make-model`` and ``demo_model.preset``."""

    TINY_ARITHMETIC = "tiny-arithmetic"
    """The demo policy, warm-started on worked sums."""
    MICRO = "micro"
    """For tests: made in seconds."""
    MEDIUM_160M = "medium-160m"
    """Random weights, for benchmarks."""
    WIDE_450M = "wide-450m"
    """Random weights, wide enough that a CPU step is bound by memory traffic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPreset:
    """Sizes of one Qwen3 model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    alphabet: str
    max_positions: int
    dtype: Literal["float32", "bfloat16"]
    warm_start: bool
    """Whether the weights are trained on the task or left random."""


_PRESETS: dict[Preset, ModelPreset] = {
    Preset.TINY_ARITHMETIC: ModelPreset(
        hidden_size=256,
        intermediate_size=768,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=64,
        alphabet=FULL_ALPHABET,
        max_positions=1024,
        dtype="float32",
        warm_start=True,
    ),
    Preset.MICRO: ModelPreset(
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=32,
        alphabet=SMALL_ALPHABET,
        max_positions=512,
        dtype="float32",
        warm_start=True,
    ),
    Preset.MEDIUM_160M: ModelPreset(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=12,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=16000,
        alphabet=FULL_ALPHABET,
        max_positions=4096,
        dtype="bfloat16",
        warm_start=False,
    ),
    Preset.WIDE_450M: ModelPreset(
        hidden_size=2048,
        intermediate_size=5504,
        num_layers=10,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=32000,
        alphabet=FULL_ALPHABET,
        max_positions=4096,
        dtype="bfloat16",
        warm_start=False,
    ),
}


def preset_of(name: str) -> ModelPreset:
    """Sizes of a preset.

    Raises:
        ConfigurationError: no such preset.
    """
    try:
        return _PRESETS[Preset(name)]
    except ValueError as exc:
        known = ", ".join(preset.value for preset in Preset)
        raise ConfigurationError(
            f"demo_model.preset {name!r} is not one of {known}", param="demo_model.preset"
        ) from exc
