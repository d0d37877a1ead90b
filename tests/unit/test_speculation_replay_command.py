"""An engine's trace, decided again: the same when nothing is changed, and told when not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rollout_server.speculation.driver import SpeculationDriver
from rollout_server.speculation.replay_command import main
from rollout_server.speculation.steps import EngineLoadSample, StepShape
from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationMode


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Of an engine whose batch grows and shrinks, is idle at times, and has its policy changed."""
    config = SpeculationConfig(
        mode=SpeculationMode.ADAPTIVE, min_dwell_steps=2, trace_directory=str(tmp_path)
    )
    driver = SpeculationDriver("engine-0", config, kv_capacity_tokens=10_000)
    draw = random.Random(0)
    for step in range(400):
        time_s = 0.01 * step
        num_reqs = 1 + abs(200 - step) // 20
        sample = EngineLoadSample(
            time_s=time_s,
            kv_cache_usage=num_reqs / 16,
            num_running_reqs=num_reqs,
            num_waiting_reqs=0,
            num_decode_reqs=num_reqs,
            num_kv_tokens=100 * num_reqs,
            max_draft_tokens=4,
        )
        decision = driver.decide(sample)
        if step % 7 == 0:
            continue  # everybody has just ended: vLLM schedules nothing and asks no further
        confirmed = driver.confirm(sample, decision, sample.kv_cache_usage, time_s)
        k = confirmed.num_speculative_tokens
        for _ in range(num_reqs if k else 0):
            driver.count_draft(k, draw.randint(0, k))
        seconds = 0.01 * (1 + 0.3 * k) * draw.uniform(0.9, 1.1)
        driver.finish_step(StepShape.steady(num_reqs, 100 * num_reqs, k), seconds, time_s)
        if step == 150:
            driver.patch(SpeculationPatch(kv_cache_threshold=0.6))
        if step == 250:
            driver.weights_changed()
    driver.report(0, 0.0)
    return tmp_path / "engine-0.jsonl"


def test_unchanged_settings_decide_as_recorded(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trace), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_steps"], answer["num_different"]) == (342, 0)
    counts = answer["num_steps_per_k"]
    assert counts["recorded"] == counts["replayed"]
    assert len(counts["recorded"]) > 1
    assert sum(answer["num_steps_per_reason"].values()) == 342


def test_other_settings_show_what_they_would_have_decided(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "mode=always", "--set", "num_speculative_tokens=3"]
    assert main([str(trace), *changes]) == 0
    output = capsys.readouterr().out
    assert "mode=always, num_speculative_tokens=3" in output
    assert "342 (100.0%)" in output
    assert "3 (mode_always)" in output


def test_a_trace_that_cannot_have_come_from_its_inputs_exits_with_1(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = trace.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if '"confirmed": {' in line)
    event = json.loads(lines[index])
    event["confirmed"]["num_speculative_tokens"] = 1
    event["confirmed"]["reason"] = "mode_always"
    lines[index] = json.dumps(event)
    trace.write_text("\n".join(lines) + "\n")
    assert main([str(trace)]) == 1
    captured = capsys.readouterr()
    assert "1 (mode_always)" in captured.out
    assert "1 of 342 decisions" in captured.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mode"], "'mode' is not FIELD=VALUE"),
        (["mode=warp"], "mode 'warp'"),
        (["tempo=3"], "tempo: no such field; there are: mode, "),
        (["num_speculative_tokens=9"], "9 is above the limit of 4"),
        (["kv_cache_hysteresis=0.9"], "0.9 is not below kv_cache_threshold 0.5"),
        (["kv_cache_threshold=0.5", "kv_cache_threshold_tokens=5"], "two thresholds"),
    ],
)
def test_settings_that_cannot_be_are_bad_usage(
    trace: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for change in changes for part in ("--set", change)]
    assert main([str(trace), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", '{"kind": "weights"}\n', "no JSON\n"])
def test_what_is_no_trace_is_bad_usage(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.jsonl"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
