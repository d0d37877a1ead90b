"""History and totals of speculation decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollout_server.speculation.recorder import SpeculationRecorder
from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepObservation,
    StepShape,
)
from shared.types import SpeculationReason

SAMPLE = EngineLoadSample(
    time_s=0.0, kv_cache_usage=0.25, num_running_reqs=3, num_waiting_reqs=1, drafter_is_current=True
)
ON = SpeculationDecision(num_speculative_tokens=3, reason=SpeculationReason.BELOW_THRESHOLD)
OFF = SpeculationDecision(num_speculative_tokens=0, reason=SpeculationReason.ABOVE_THRESHOLD)


def test_every_switch_is_remembered_and_quiet_stretches_are_thinned() -> None:
    recorder = SpeculationRecorder("e", 100, 4)
    for step in range(100):
        recorder.record_step(step * 0.0011, SAMPLE, ON if step < 50 else OFF)
    report = recorder.report(0, 0.1)
    assert (report.num_steps, report.num_steps_on, report.num_switches) == (100, 50, 1)
    assert [s.step for s in report.history] == [1, 20, 39, 51, 70, 89]
    assert report.history[3].num_speculative_tokens == 0
    assert not report.enabled
    assert report.kv_cache_usage == 0.1


def test_only_steps_after_since_step_are_reported() -> None:
    recorder = SpeculationRecorder("e", 100, 4)
    for step in range(3):
        recorder.record_step(float(step), SAMPLE, ON)
    assert [s.step for s in recorder.report(1, 0.0).history] == [2, 3]


def test_history_is_bounded() -> None:
    recorder = SpeculationRecorder("e", 16, 4)
    for step in range(1000):
        recorder.record_step(float(step), SAMPLE, ON)
    assert len(recorder.report(0, 0.0).history) == 16


def test_acceptance_counts_include_the_bonus_token_in_the_mean_length_only() -> None:
    recorder = SpeculationRecorder("e", 16, 4)
    recorder.record_draft(4, 4)
    recorder.record_draft(4, 1)
    recorder.record_draft(2, 0)
    report = recorder.report(0, 0.0)
    assert (report.num_drafts, report.num_draft_tokens, report.num_accepted_tokens) == (3, 10, 5)
    assert report.num_accepted_tokens_per_pos == [2, 1, 1, 1]
    assert report.mean_acceptance_length == 1 + 5 / 3


def test_before_the_first_draft_the_mean_length_is_zero() -> None:
    assert SpeculationRecorder("e", 16, 4).report(0, 0.0).mean_acceptance_length == 0.0


def test_seconds_are_counted_by_draft_length_and_predictions_against_them() -> None:
    recorder = SpeculationRecorder("e", 16, 4)
    plain, drafting = StepShape.steady(2, 100, 0), StepShape.steady(2, 100, 3)
    recorder.record_finished_step(StepObservation(shape=plain, duration_s=0.5), 0.4)
    recorder.record_finished_step(StepObservation(shape=drafting, duration_s=1.0), 1.1)
    recorder.record_finished_step(StepObservation(shape=drafting, duration_s=2.0), None)
    report = recorder.report(0, 0.0)
    assert report.time_s_per_k == [0.5, 0.0, 0.0, 3.0, 0.0]
    assert (report.num_predicted_steps, report.realised_step_s) == (2, 1.5)
    assert report.predicted_step_s == 1.5
    assert report.median_step_time_error == pytest.approx(0.15)


def test_reasons_and_draft_lengths_are_counted() -> None:
    recorder = SpeculationRecorder("e", 16, 4)
    for decision in (ON, ON, OFF):
        recorder.record_step(0.0, SAMPLE, decision)
    report = recorder.report(0, 0.0)
    assert report.num_steps_per_k == [1, 0, 0, 2, 0]
    assert report.num_steps_per_reason == {
        SpeculationReason.BELOW_THRESHOLD: 2,
        SpeculationReason.ABOVE_THRESHOLD: 1,
    }


def test_kv_usage_is_counted_in_tenths_a_full_cache_in_the_last() -> None:
    recorder = SpeculationRecorder("e", 16, 4)
    for usage in (0.0, 0.05, 0.25, 0.95, 1.0):
        recorder.record_step(0.0, replace(SAMPLE, kv_cache_usage=usage), ON)
    report = recorder.report(0, 0.0)
    assert report.num_steps_per_kv_usage == [2, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    assert report.kv_cache_usage_sum == pytest.approx(2.25)


def test_a_decision_remembers_the_tokens_generated_before_it() -> None:
    recorder = SpeculationRecorder("e", 16, 4)
    recorder.record_step(0.0, SAMPLE, ON)
    finished = StepObservation(
        shape=StepShape.steady(3, 100, 4),
        duration_s=0.5,
        num_tried_per_pos=(3, 2, 1, 0),
        num_accepted_per_pos=(2, 1, 0, 0),
    )
    recorder.record_finished_step(finished, None)
    recorder.record_step(1.0, SAMPLE, ON)
    assert [step.num_generated_tokens for step in recorder.report(0, 0.0).history] == [0, 6]
