"""Remembers an engine's speculation decisions and counts what came of them. Pure."""

from __future__ import annotations

from collections import Counter, deque
from statistics import median
from typing import Any

from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepObservation,
)
from shared.schemas.speculation import EngineSpeculation, SpeculationStep
from shared.types import SpeculationReason

SAMPLE_INTERVAL_S = 0.02
"""Between switches, at most one step per this interval is remembered."""
NUM_KV_USAGE_BUCKETS = 10
NUM_REMEMBERED_ERRORS = 1000
"""Steps that the median error of the predictions is taken over."""


class SpeculationRecorder:
    """Bounded history of decisions plus running totals."""

    def __init__(self, engine_id: str, history_size: int, max_num_speculative_tokens: int) -> None:
        self._engine_id = engine_id
        self._history: deque[SpeculationStep] = deque(maxlen=history_size)
        self._last: SpeculationDecision | None = None
        self._last_recorded_s = float("-inf")
        self._num_steps = 0
        self._num_steps_on = 0
        self._num_switches = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0
        self._num_accepted_tokens_per_pos = [0] * max_num_speculative_tokens
        self._num_steps_per_k = [0] * (max_num_speculative_tokens + 1)
        self._time_s_per_k = [0.0] * (max_num_speculative_tokens + 1)
        self._num_steps_per_reason: Counter[SpeculationReason] = Counter()
        self._num_steps_per_kv_usage = [0] * NUM_KV_USAGE_BUCKETS
        self._kv_cache_usage_sum = 0.0
        self._num_generated_tokens = 0
        self._num_predicted_steps = 0
        self._predicted_step_s = 0.0
        self._realised_step_s = 0.0
        self._errors: deque[float] = deque(maxlen=NUM_REMEMBERED_ERRORS)

    def record_step(
        self, unix_time_s: float, sample: EngineLoadSample, decision: SpeculationDecision
    ) -> None:
        """Count a step; remember it if it differs from the last one or enough time has passed."""
        k = decision.num_speculative_tokens
        self._num_steps += 1
        self._num_steps_on += k > 0
        self._num_steps_per_k[k] += 1
        self._num_steps_per_reason[decision.reason] += 1
        usage = sample.kv_cache_usage
        self._kv_cache_usage_sum += usage
        bucket = min(int(usage * NUM_KV_USAGE_BUCKETS), NUM_KV_USAGE_BUCKETS - 1)
        self._num_steps_per_kv_usage[bucket] += 1
        previous, self._last = self._last, decision
        if previous is not None and (previous.num_speculative_tokens > 0) != (k > 0):
            self._num_switches += 1
        changed = previous is None or previous.num_speculative_tokens != k
        if changed or unix_time_s - self._last_recorded_s >= SAMPLE_INTERVAL_S:
            self._last_recorded_s = unix_time_s
            self._history.append(
                SpeculationStep(
                    step=self._num_steps,
                    time_s=unix_time_s,
                    kv_cache_usage=usage,
                    num_running_reqs=sample.num_running_reqs,
                    num_waiting_reqs=sample.num_waiting_reqs,
                    num_kv_tokens=sample.num_kv_tokens,
                    num_generated_tokens=self._num_generated_tokens,
                    num_speculative_tokens=k,
                    reason=decision.reason,
                    predicted_tokens_per_s=decision.predicted_tokens_per_s,
                    predicted_speedup=decision.predicted_speedup,
                )
            )

    def record_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Count one verified draft."""
        self._num_drafts += 1
        self._num_draft_tokens += num_draft_tokens
        self._num_accepted_tokens += num_accepted_tokens
        for position in range(num_accepted_tokens):
            self._num_accepted_tokens_per_pos[position] += 1

    def record_finished_step(self, observation: StepObservation, expected_s: float | None) -> None:
        """Count the seconds of a finished step, and those the cost model expected of it."""
        duration_s = observation.duration_s
        # One token per request that samples, and one per accepted draft.
        self._num_generated_tokens += observation.shape.num_decode_reqs
        self._num_generated_tokens += sum(observation.num_accepted_per_pos)
        self._time_s_per_k[observation.shape.num_speculative_tokens] += duration_s
        if expected_s is not None and duration_s > 0:
            self._num_predicted_steps += 1
            self._predicted_step_s += expected_s
            self._realised_step_s += duration_s
            self._errors.append(abs(expected_s / duration_s - 1))

    def report(
        self, since_step: int, kv_cache_usage: float, **of_controller: Any
    ) -> EngineSpeculation:
        """Totals, and the remembered steps after ``since_step``.

        Args:
            of_controller: further fields of ``EngineSpeculation``, which the controller knows.
        """
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
            num_steps_per_k=list(self._num_steps_per_k),
            time_s_per_k=list(self._time_s_per_k),
            num_steps_per_reason=dict(self._num_steps_per_reason),
            num_steps_per_kv_usage=list(self._num_steps_per_kv_usage),
            kv_cache_usage_sum=self._kv_cache_usage_sum,
            num_predicted_steps=self._num_predicted_steps,
            predicted_step_s=self._predicted_step_s,
            realised_step_s=self._realised_step_s,
            median_step_time_error=median(self._errors) if self._errors else None,
            history=[step for step in self._history if step.step > since_step],
            **of_controller,
        )
