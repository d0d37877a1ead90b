"""The speculation controller: raw facts in, a draft length and a reason out. Pure, no clock.

The KV gate is a two-state machine::

    OPEN   --(usage >= threshold)-------------------------------------------> CLOSED
    CLOSED --(usage < threshold - hysteresis, after min_dwell_steps)---------> OPEN

Closing is immediate, because above the threshold speculation costs the users of the engine.
Opening is slow: hysteresis and dwell keep a load that hovers at the threshold from flapping.

Under an open gate a ``DraftLengthRule`` chooses the length. ``FixedDraftLength`` is the rule of the
mode ``kv_gate``; a cost model is another rule with the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from shared.schemas.speculation import SpeculationPolicy
from shared.types import SpeculationMode, SpeculationReason


class GateState(StrEnum):
    """Whether the KV gate lets speculation through."""

    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoadSample:
    """What one engine step looks like; verdicts live in the controller."""

    kv_cache_usage: float
    """Fraction 0..1 of KV blocks in use, this step's reservations included."""
    num_running_reqs: int
    num_waiting_reqs: int
    drafter_is_current: bool
    """Drafter and target were built from the same weight version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationDecision:
    """What the step does."""

    num_speculative_tokens: int
    reason: SpeculationReason


class DraftLengthRule(Protocol):
    """Chooses a draft length under an open gate."""

    def choose(self, sample: EngineLoadSample, policy: SpeculationPolicy) -> int: ...


class FixedDraftLength:
    """Always the policy's ``num_speculative_tokens``."""

    def choose(self, sample: EngineLoadSample, policy: SpeculationPolicy) -> int:
        return policy.num_speculative_tokens


class SpeculationController:
    """One engine's decisions. Not thread-safe: it lives in the engine core's step."""

    def __init__(self, policy: SpeculationPolicy, rule: DraftLengthRule | None = None) -> None:
        self._policy = policy
        self._rule = rule or FixedDraftLength()
        self._gate = GateState.OPEN
        self._steps_closed = 0

    @property
    def policy(self) -> SpeculationPolicy:
        return self._policy

    def set_policy(self, policy: SpeculationPolicy) -> None:
        """Take effect at the next decision; the gate keeps its state."""
        self._policy = policy

    def decide(self, sample: EngineLoadSample) -> SpeculationDecision:
        """Advance one step and decide for it."""
        # The gate is advanced in every mode, so that a live change finds it up to date.
        gate_reason = self._advance_gate(sample.kv_cache_usage)
        if self._policy.mode is SpeculationMode.OFF:
            return _no_draft(SpeculationReason.MODE_OFF)
        if not sample.drafter_is_current:
            return _no_draft(SpeculationReason.STALE_DRAFTER)
        if self._policy.mode is SpeculationMode.ALWAYS:
            return SpeculationDecision(
                num_speculative_tokens=self._policy.num_speculative_tokens,
                reason=SpeculationReason.MODE_ALWAYS,
            )
        if self._gate is GateState.CLOSED:
            return _no_draft(gate_reason)
        return SpeculationDecision(
            num_speculative_tokens=self._rule.choose(sample, self._policy), reason=gate_reason
        )

    def _advance_gate(self, kv_cache_usage: float) -> SpeculationReason:
        policy = self._policy
        if kv_cache_usage >= policy.kv_cache_threshold:
            if self._gate is GateState.OPEN:
                self._steps_closed = 0
            self._gate = GateState.CLOSED
            self._steps_closed += 1
            return SpeculationReason.ABOVE_THRESHOLD
        if self._gate is GateState.OPEN:
            return SpeculationReason.BELOW_THRESHOLD
        self._steps_closed += 1
        if kv_cache_usage >= policy.kv_cache_threshold - policy.kv_cache_hysteresis:
            return SpeculationReason.ABOVE_THRESHOLD
        if self._steps_closed <= policy.min_dwell_steps:
            return SpeculationReason.DWELL
        self._gate = GateState.OPEN
        return SpeculationReason.BELOW_THRESHOLD


def _no_draft(reason: SpeculationReason) -> SpeculationDecision:
    return SpeculationDecision(num_speculative_tokens=0, reason=reason)
