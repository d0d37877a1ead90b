"""The models and drafters the proof runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rollout_server.engine.actor import EngineActor
from shared.types import DrafterScheme
from tests.support.architectures import ARCHITECTURES
from tests.support.models import make_model

MODEL_MAKERS: dict[str, Callable[..., Path]] = {
    "qwen3-tiny": make_model,
    **{architecture.name: architecture for architecture in ARCHITECTURES},
}
"""Name to maker (``path``, ``seed``) of a tiny float32 model."""
SCHEMES = (DrafterScheme.INT8, DrafterScheme.INT4, DrafterScheme.FP8, DrafterScheme.NONE)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfDrafting:
    """An engine that drafts for one architecture with one scheme."""

    engine: EngineActor
    model: Path
    name: str
    is_exact_drafter: bool
    """Its drafts are all accepted."""
