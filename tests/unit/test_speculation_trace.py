"""A trace holds what a controller saw and said; a replay says it again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from rollout_server.speculation.driver import SpeculationDriver
from rollout_server.speculation.replay import replay
from rollout_server.speculation.steps import EngineLoadSample, StepShape
from rollout_server.speculation.trace import read_trace
from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationMode

MODEL = CostModel(
    target=PiecewiseLinear(knots=(1, 64), values_s=(0.03, 0.09)),
    draft=PiecewiseLinear(knots=(1, 64), values_s=(0.008, 0.03)),
)


def drive(directory: Path) -> None:
    """A run with everything in it: learning, a push, a live change, another calibration."""
    config = SpeculationConfig.model_validate(
        {"mode": SpeculationMode.ADAPTIVE, "trace_directory": str(directory)}
    )
    driver = SpeculationDriver("e", config, kv_capacity_tokens=10_000)
    driver.set_cost_model(MODEL, "test")
    generator = random.Random(0)
    now = 0.0
    for step in range(400):
        num_reqs = max(1, 24 - step // 16)
        sample = EngineLoadSample(
            time_s=now,
            kv_cache_usage=min(num_reqs / 40 + 0.1 * generator.random(), 1.0),
            num_running_reqs=num_reqs,
            num_waiting_reqs=0,
            num_decode_reqs=num_reqs,
            num_kv_tokens=100 * num_reqs,
        )
        decision = driver.decide(sample)
        usage = sample.kv_cache_usage + 0.02
        confirmed = driver.confirm(sample, decision, usage, unix_time_s=1e9 + now)
        k = confirmed.num_speculative_tokens
        shape = StepShape.steady(num_reqs, 100 * num_reqs, k)
        for _ in range(num_reqs if k else 0):
            driver.count_draft(k, generator.randint(0, k))
        now += MODEL.step_s(shape) * generator.lognormvariate(0, 0.1)
        driver.finish_step(shape, MODEL.step_s(shape) * generator.lognormvariate(0, 0.1), now)
        if step == 150:
            driver.weights_changed()
        if step == 250:
            driver.patch(SpeculationPatch(num_speculative_tokens=2))
    driver.report(0, 0.0)  # flushes


def test_a_replay_decides_exactly_what_was_decided(tmp_path: Path) -> None:
    drive(tmp_path)
    report = replay(read_trace(tmp_path / "e.jsonl"))
    assert report.num_steps == 400
    assert report.num_different == 0, report.first_differences
    assert report.steps_per_k_recorded == report.steps_per_k_replayed
    assert len(report.steps_per_k_recorded) > 2, "the run chose several draft lengths"


def test_changed_settings_show_where_they_would_have_decided_otherwise(tmp_path: Path) -> None:
    drive(tmp_path)
    changes = SpeculationPatch(mode=SpeculationMode.OFF)
    report = replay(read_trace(tmp_path / "e.jsonl"), changes)
    drafting = 400 - report.steps_per_k_recorded[0]
    assert report.steps_per_k_replayed == {0: 400}
    assert report.num_different >= drafting > 0


def test_a_last_line_cut_off_is_left_out_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    drive(tmp_path)
    trace = tmp_path / "e.jsonl"
    trace.write_text(trace.read_text()[:-25])
    assert replay(read_trace(trace)).num_steps == 400
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"hello": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a trace event"):
        replay(read_trace(foreign))
    foreign.write_text("")
    with pytest.raises(ValueError, match="empty"):
        replay(read_trace(foreign))
    foreign.write_text("\n".join(trace.read_text().splitlines()[5:9]) + "\n")
    with pytest.raises(ValueError, match="does not begin with a start event"):
        replay(read_trace(foreign))
