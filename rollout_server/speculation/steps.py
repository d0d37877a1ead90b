"""What an engine step computed, and what is known when one is decided. Plain facts, no verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from shared.types import SpeculationReason


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """The work of one engine step: one target pass, then ``num_speculative_tokens`` draft passes.

    Drafts made at the end of one step are verified by the target pass of the next.
    """

    num_decode_reqs: int
    """Requests that sample in this step."""
    num_verified_tokens: int
    """Drafts of the step before, over all requests: rows of the target pass beyond one each."""
    num_prefill_tokens: int
    """Rows of the target pass that belong to prompts."""
    num_kv_tokens: int
    """Tokens whose keys and values the step's attention reads, over all requests."""
    num_speculative_tokens: int
    """Draft passes at the end of the step."""
    num_drafting_reqs: int
    """Rows of each draft pass."""

    @classmethod
    def steady(cls, num_reqs: int, num_kv_tokens: int, num_speculative_tokens: int) -> StepShape:
        """A step among steps like it: verifies as many drafts as it makes."""
        return cls(
            num_decode_reqs=num_reqs,
            num_verified_tokens=num_reqs * num_speculative_tokens,
            num_prefill_tokens=0,
            num_kv_tokens=num_kv_tokens,
            num_speculative_tokens=num_speculative_tokens,
            num_drafting_reqs=num_reqs,
        )

    @property
    def is_steady(self) -> bool:
        """Whether the step verified as much as it drafted and prefilled nothing."""
        return (
            self.num_prefill_tokens == 0
            and self.num_decode_reqs > 0
            and self.num_verified_tokens == self.num_decode_reqs * self.num_speculative_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepObservation:
    """A finished step."""

    shape: StepShape
    duration_s: float
    """Wall-clock seconds of the whole cycle, bookkeeping included."""
    num_tried_per_pos: tuple[int, ...] = ()
    """Drafts verified at each position whose predecessors were all accepted, over all requests."""
    num_accepted_per_pos: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoadSample:
    """What is known when a step's draft length is chosen."""

    time_s: float
    """Any clock that never goes back."""
    kv_cache_usage: float
    """Fraction 0..1 of KV blocks in use, slots reserved for this step's drafts included."""
    num_running_reqs: int
    num_waiting_reqs: int
    drafter_is_current: bool = True
    """Drafter and target were built from the same weight version, or as near as configured."""
    num_decode_reqs: int = 0
    """Requests that will hold drafts after this step."""
    num_kv_tokens: int = 0
    """Tokens in the KV cache of the running requests."""
    max_draft_tokens: int | None = None
    """Draft length KV slots were reserved for in this step; None: whatever the policy allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationDecision:
    """What the step does, and what the controller expected of it."""

    num_speculative_tokens: int
    reason: SpeculationReason
    predicted_tokens_per_s: float | None = None
    """Of steps like this one, by the cost model; None where none was asked."""
    predicted_speedup: float | None = None
    """The same over plain decoding."""
