"""Goes through draft lengths in turn and keeps every step's seconds: calibration. Pure.

All draft lengths take turns within one running batch, a few steps each, so that they see the same
sequences, the same contexts and the same disturbances of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepShape,
)
from shared.types import SpeculationReason


class Sweep:
    """One sweep over draft lengths."""

    def __init__(self, draft_lengths: Sequence[int], steps_each: int) -> None:
        self._draft_lengths = tuple(draft_lengths)
        self._steps_each = steps_each
        self._num_steps = 0
        self.steps: list[tuple[StepShape, float]] = []

    def decide(self, sample: EngineLoadSample) -> SpeculationDecision:
        """The next step's draft length; nothing where there is no room."""
        turn = self._num_steps // self._steps_each
        self._num_steps += 1
        length = self._draft_lengths[turn % len(self._draft_lengths)]
        if sample.max_draft_tokens is not None:
            length = min(length, sample.max_draft_tokens)
        return SpeculationDecision(
            num_speculative_tokens=length, reason=SpeculationReason.MODE_ALWAYS
        )

    def observe(self, shape: StepShape, duration_s: float) -> None:
        """A step is over."""
        self.steps.append((shape, duration_s))
