"""``make_model``: a complete model directory, or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import Qwen3Config, Qwen3ForCausalLM

from shared.config.trainer import ArithmeticTaskConfig
from shared.errors import ConfigurationError, SlipstreamError
from trainer.demo_model.accuracy import Accuracy
from trainer.demo_model.presets import ModelPreset, preset_of
from trainer.demo_model.tokenizer import build_tokenizer
from trainer.demo_model.warm_start import WarmStartProgress, warm_start

REPORT_FILE = "slipstream_model.json"
ROPE_THETA = 10_000.0
INITIALIZER_RANGE = 0.02


class ModelReport(BaseModel):
    """What was made; kept as ``slipstream_model.json`` beside the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    seed: int
    num_parameters: int
    dtype: str
    warm_start_steps: int
    """Steps really made."""
    final_loss: float | None
    accuracy: Accuracy | None
    """Last measurement of the warm start; None without one."""
    task: ArithmeticTaskConfig


def make_model(
    output: Path,
    preset: str,
    seed: int,
    warm_start_steps: int,
    task: ArithmeticTaskConfig,
    on_progress: Callable[[WarmStartProgress], None] = lambda _: None,
) -> ModelReport:
    """Create a model directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    A complete directory is left as it is, whatever it was made with; an incomplete one never
    appears under ``output``.

    Raises:
        ConfigurationError: no such preset, or ``output`` holds something that is no model of ours.
        SlipstreamError: the directory cannot be written.
    """
    sizes = preset_of(preset)
    existing = _read_report(output)
    if existing is not None:
        return existing
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            report = _build_into(partial, sizes, preset, seed, warm_start_steps, task, on_progress)
        # Last, because its presence is what makes a directory complete.
        (partial / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n")
        os.replace(partial, output)
    except OSError as exc:
        raise SlipstreamError(f"model directory {output} cannot be written: {exc}") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _build_into(
    directory: Path,
    sizes: ModelPreset,
    preset: str,
    seed: int,
    warm_start_steps: int,
    task: ArithmeticTaskConfig,
    on_progress: Callable[[WarmStartProgress], None],
) -> ModelReport:
    tokenizer = build_tokenizer(sizes.alphabet, sizes.vocab_size, sizes.max_positions)
    model = _random_model(sizes, tokenizer)
    num_steps, loss, accuracy = 0, None, None
    if sizes.warm_start and warm_start_steps > 0:
        result = warm_start(
            model,
            tokenizer,
            task,
            seed=seed,
            num_steps=warm_start_steps,
            on_progress=on_progress,
        )
        num_steps, loss, accuracy = result.num_steps, result.loss, result.accuracy
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(getattr(torch, sizes.dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return ModelReport(
        preset=preset,
        seed=seed,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=sizes.dtype,
        warm_start_steps=num_steps,
        final_loss=loss,
        accuracy=accuracy,
        task=task,
    )


def _random_model(sizes: ModelPreset, tokenizer: Any) -> Any:
    config = Qwen3Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Short rows on a CPU: the fused kernel's backward pass costs twice the plain one's.
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config)


def _read_report(output: Path) -> ModelReport | None:
    if not output.exists():
        return None
    try:
        return ModelReport.model_validate_json((output / REPORT_FILE).read_text())
    except (OSError, ValidationError) as exc:
        raise ConfigurationError(
            f"{output} exists and has no readable {REPORT_FILE}: it was not made here; "
            "choose another directory (model.path, --output) or remove it",
            param="model.path",
        ) from exc
