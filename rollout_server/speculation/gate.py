"""The KV gate: speculation only while KV-cache occupancy is below a threshold. Pure.

A two-state machine::

    OPEN   --(usage >= threshold)-------------------------------------------> CLOSED
    CLOSED --(usage < threshold - hysteresis, after min_dwell_steps)---------> OPEN

Closing is immediate, because above the threshold speculation costs the users of the engine.
Opening is slow: hysteresis and dwell keep a load that hovers at the threshold from flapping.
"""

from __future__ import annotations

from enum import StrEnum

from shared.types import SpeculationReason


class GateState(StrEnum):
    """Whether the KV gate lets speculation through."""

    OPEN = "open"
    CLOSED = "closed"


class KvGate:
    """One engine's gate; advanced once per step, in every mode, so that it is never out of date."""

    def __init__(self) -> None:
        self.state = GateState.OPEN
        self._steps_closed = 0

    def advance(
        self, kv_cache_usage: float, *, threshold: float, hysteresis: float, min_dwell_steps: int
    ) -> SpeculationReason:
        """Take one step at this usage (fractions 0..1); why the gate is now as it is."""
        if kv_cache_usage >= threshold:
            if self.state is GateState.OPEN:
                self._steps_closed = 0
            self.state = GateState.CLOSED
            self._steps_closed += 1
            return SpeculationReason.ABOVE_THRESHOLD
        if self.state is GateState.OPEN:
            return SpeculationReason.BELOW_THRESHOLD
        self._steps_closed += 1
        if kv_cache_usage >= threshold - hysteresis:
            return SpeculationReason.ABOVE_THRESHOLD
        if self._steps_closed <= min_dwell_steps:
            return SpeculationReason.DWELL
        self.state = GateState.OPEN
        return SpeculationReason.BELOW_THRESHOLD
