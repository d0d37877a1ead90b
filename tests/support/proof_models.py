"""The models the proof runs over: name to maker (``path``, ``seed``) of a tiny float32 model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.architectures import ARCHITECTURES
from tests.support.models import make_model

MODEL_MAKERS: dict[str, Callable[..., Path]] = {
    "qwen3-tiny": make_model,
    **{architecture.name: architecture for architecture in ARCHITECTURES},
}
