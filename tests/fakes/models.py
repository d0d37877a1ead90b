"""A model small enough to be made and run inside a unit test."""

from __future__ import annotations

from pathlib import Path

from shared.config.trainer import ArithmeticTaskConfig
from trainer.demo_model.build import make_model

MICRO_TASK = ArithmeticTaskConfig(num_terms=(2, 2), max_operand=9)


def make_micro_model(path: Path, *, warm_start_steps: int = 0) -> Path:
    """The ``micro`` preset under ``path``; random weights unless warm-started."""
    make_model(path, "micro", 0, warm_start_steps, MICRO_TASK)
    return path
