"""The live view follows files that are still being written."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from trainer.progress import ProgressState, RunFollower, plain_line, render, sparkline
from trainer.report.jsonl import JsonlTail

DECISION = {
    "engine_id": "engine-0", "step": 0, "time_s": 1.0, "kv_cache_usage": 0.25,
    "num_speculative_tokens": 3, "reason": "below_threshold",
}  # fmt: skip


def screen(state: ProgressState) -> str:
    console = Console(file=StringIO(), width=120, force_terminal=False)
    console.print(render(state))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = JsonlTail(path)
    assert tail.read_new() == []
    append(path, '{"step": 1}\n{"st')
    assert tail.read_new() == [{"step": 1}]
    append(path, 'ep": 2}\n')
    assert tail.read_new() == [{"step": 2}]
    assert tail.read_new() == []


def test_the_screen_shows_before_the_first_step_that_it_starts(tmp_path: Path) -> None:
    assert "starting" in screen(RunFollower(tmp_path).state)


def test_the_screen_shows_step_reward_and_what_each_engine_does(tmp_path: Path) -> None:
    follower = RunFollower(tmp_path)
    append(tmp_path / "metrics.jsonl", '{"step": 1, "reward/mean": 0.125, "eval/accuracy": 0.5}\n')
    append(tmp_path / "metrics.jsonl", '{"step": 2, "reward/mean": 0.25, "weights/version": 2}\n')
    append(tmp_path / "events.jsonl", '{"time_s": 1, "event": "push_start", "step": 2}\n')
    append(tmp_path / "speculation.jsonl", json.dumps(DECISION) + "\n")
    assert len(follower.update()) == 2
    text = screen(follower.state)
    for part in ("step 2", "0.250", "50.0%", "v2", "pushing weights", "KV 25%", "drafts 3"):
        assert part in text


def test_the_share_of_steps_with_speculation_is_weighted_by_steps() -> None:
    state = ProgressState(num_steps=None, threshold=None)
    for step, draft in ((0, 3), (30, 0), (40, 0)):
        state.add_decision({**DECISION, "step": step, "num_speculative_tokens": draft})
    assert state.engines["engine-0"].on_fraction == 0.75
    assert "does not draft" in screen(state)


def test_a_plain_line_shows_accuracy_only_when_it_was_measured() -> None:
    assert "accuracy 40.0%" in plain_line({"step": 1, "eval/accuracy": 0.4})
    assert "accuracy" not in plain_line({"step": 1, "eval/accuracy": None})


def test_a_sparkline_spans_from_smallest_to_largest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def test_sampling_is_shown_beside_what_the_loop_does() -> None:
    state = ProgressState(num_steps=None, threshold=None)
    shown = []
    for event, step in (
        ("rollout_start", 1), ("rollout_start", 2), ("wait_start", 1), ("rollout_end", 1),
        ("wait_end", 1), ("train_start", 1), ("rollout_end", 2), ("train_end", 1),
    ):  # fmt: skip
        state.add_event({"event": event, "step": step})
        shown.append(state.activity)
    assert shown == [
        "sampling rollouts",
        "sampling 2 batches",
        "waiting for rollouts, sampling 2 batches",
        "waiting for rollouts",
        "sampling rollouts",
        "training, sampling rollouts",
        "training",
        "between phases",
    ]
    state.add_metrics({"step": 2, "lag/max": 1, "lag/mean": 0.5, "rollout/hidden_fraction": 0.75})
    assert "policy lag 0.50 updates" in screen(state)
    assert "sampling hidden 75%" in screen(state)


def test_by_turns_the_screen_says_nothing_of_lag() -> None:
    state = ProgressState(num_steps=None, threshold=None)
    state.add_event({"event": "rollout_start", "step": 1})
    state.add_metrics({"step": 1, "lag/max": 0, "lag/mean": 0.0})
    assert "sampling rollouts" in screen(state)
    assert "policy lag" not in screen(state)
