"""What is known of an engine once it has started."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.speculation.calibration import SelfCalibration
from shared.types import DrafterScheme


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """What is known of an engine once it has started."""

    pid: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    start_up_s: float
    drafter_scheme: DrafterScheme
    """After ``auto`` is resolved on the engine's device; ``none`` without a drafter."""
    drafter_bytes: int
    self_calibration: SelfCalibration | None = None
    """What it measured itself, or was handed on to it."""
