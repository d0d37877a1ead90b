"""Remembers an engine's speculation decisions and counts drafts. Pure; time is passed in."""

from __future__ import annotations

from collections import deque

from rollout_server.speculation.controller import EngineLoadSample, SpeculationDecision
from shared.schemas.speculation import EngineSpeculation, SpeculationStep
from shared.types import SpeculationReason

SAMPLE_INTERVAL_S = 0.02
"""Between switches, at most one step per this interval is remembered."""


class SpeculationRecorder:
    """Bounded history of decisions plus running totals."""

    def __init__(self, engine_id: str, history_size: int, max_num_speculative_tokens: int) -> None:
        self._engine_id = engine_id
        self._history: deque[SpeculationStep] = deque(maxlen=history_size)
        self._last: SpeculationStep | None = None
        self._last_recorded_s = float("-inf")
        self._num_steps = 0
        self._num_steps_on = 0
        self._num_switches = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0
        self._num_accepted_tokens_per_pos = [0] * max_num_speculative_tokens

    def record_step(
        self, time_s: float, sample: EngineLoadSample, decision: SpeculationDecision
    ) -> None:
        """Count a step; remember it if it differs from the last one or enough time has passed."""
        self._num_steps += 1
        is_on = decision.num_speculative_tokens > 0
        self._num_steps_on += is_on
        previous = self._last
        switched = previous is not None and (previous.num_speculative_tokens > 0) != is_on
        self._num_switches += switched
        changed = previous is None or (
            previous.num_speculative_tokens != decision.num_speculative_tokens
        )
        due = time_s - self._last_recorded_s >= SAMPLE_INTERVAL_S
        self._last = SpeculationStep(
            step=self._num_steps,
            time_s=time_s,
            kv_cache_usage=sample.kv_cache_usage,
            num_running_reqs=sample.num_running_reqs,
            num_waiting_reqs=sample.num_waiting_reqs,
            num_speculative_tokens=decision.num_speculative_tokens,
            reason=decision.reason,
        )
        if changed or due:
            self._history.append(self._last)
            self._last_recorded_s = time_s

    def record_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Count one verified draft."""
        self._num_drafts += 1
        self._num_draft_tokens += num_draft_tokens
        self._num_accepted_tokens += num_accepted_tokens
        for position in range(num_accepted_tokens):
            self._num_accepted_tokens_per_pos[position] += 1

    def report(self, since_step: int, kv_cache_usage: float) -> EngineSpeculation:
        """Totals, and the remembered steps after ``since_step``."""
        last = self._last
        drafts = self._num_drafts
        return EngineSpeculation(
            engine_id=self._engine_id,
            enabled=last is not None and last.num_speculative_tokens > 0,
            num_speculative_tokens=0 if last is None else last.num_speculative_tokens,
            reason=SpeculationReason.BELOW_THRESHOLD if last is None else last.reason,
            kv_cache_usage=kv_cache_usage,
            num_steps=self._num_steps,
            num_steps_on=self._num_steps_on,
            num_switches=self._num_switches,
            num_drafts=drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_accepted_tokens_per_pos=list(self._num_accepted_tokens_per_pos),
            mean_acceptance_length=1 + self._num_accepted_tokens / drafts if drafts else 0.0,
            history=[step for step in self._history if step.step > since_step],
        )
