"""The report of whole, partial, broken and hostile runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from shared.config.loading import dump_run_config, load_run_config
from trainer.report.build import build_report
from trainer.report.run_data import Decision, Event, read_run
from trainer.report.speculation_stats import (
    busy_stretches,
    liveliest_window,
    on_intervals,
    rollout_windows,
    speculation_share,
)
from trainer.report.summary import duration, summarize

ALL_PLOTS = {
    "reward.png", "accuracy.png", "speculation.png", "timeline.png", "timeline_zoom.png",
    "acceptance.png", "throughput.png", "phases.png",
}  # fmt: skip


def write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def step_record(step: int) -> dict[str, object]:
    return {
        "step": step, "reward/mean": 0.1 * step, "reward/std": 0.2, "eval/accuracy": 0.05 * step,
        "rollout/tokens_per_s": 100.0, "rollout/mean_acceptance_length": 3.0,
        "rollout/num_draft_tokens": 30, "rollout/num_accepted_tokens": 20,
        "rollout/max_completion_tokens": 50, "phase/rollout_s": 6.0, "phase/train_s": 2.0,
        "weights/version": step, "weights/push_s": 0.5, "weights/paused_s": None,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A complete run of six steps with one engine."""
    config = load_run_config(None, ["model.path=some/model", "name=job"], {})
    (tmp_path / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
    before_training = {"step": 0, "eval/accuracy": 0.0}
    write_lines(tmp_path / "metrics.jsonl", [before_training, *map(step_record, range(1, 7))])
    events, decisions = [], []
    for step in range(1, 7):
        start = 1000.0 + 10 * step
        events += [{"time_s": start, "event": "rollout_start", "step": step},
                   {"time_s": start + 6, "event": "rollout_end", "step": step}]  # fmt: skip
        for tick in range(6):
            drafting = tick in (0, 4, 5)
            decisions.append({
                "engine_id": "engine-0", "step": 60 * step + 10 * tick, "time_s": start + tick,
                "kv_cache_usage": 0.2 if drafting else 0.8, "reason": "below_threshold",
                "num_speculative_tokens": 3 if drafting else 0,
            })  # fmt: skip
    write_lines(tmp_path / "events.jsonl", events)
    write_lines(tmp_path / "speculation.jsonl", decisions)
    sample = {"step": 1, "prompt": "<script>alert(1)</script>", "completion": "1 < 2 & 3",
              "reward": 1.0, "finish_reason": "stop",
              "weight_versions": [{"version": 0, "start": 0, "end": 4}]}  # fmt: skip
    write_lines(tmp_path / "rollouts.jsonl", [sample])
    return tmp_path


def test_a_complete_run_gets_every_plot_and_one_self_contained_page(run_dir: Path) -> None:
    page = build_report(run_dir).read_text(encoding="utf-8")
    assert {path.name for path in (run_dir / "plots").iterdir()} == ALL_PLOTS
    assert page.count("data:image/png;base64,") == len(ALL_PLOTS)
    # The configuration it shows may name addresses; nothing is loaded from any.
    assert not re.search(r"""(src|href)=["']?https?:|url\(["']?https?:|@import""", page)
    assert "https://" not in page


def test_what_the_model_wrote_is_escaped(run_dir: Path) -> None:
    page = build_report(run_dir).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "1 &lt; 2 &amp; 3" in page


def test_the_summary_has_the_figures_of_the_run(run_dir: Path) -> None:
    build_report(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["num_steps"] == 6
    assert summary["first_reward"] == pytest.approx(0.2)
    assert summary["last_reward"] == pytest.approx(0.5)
    assert summary["acceptance_rate"] == pytest.approx(2 / 3)
    assert summary["rollout_time_fraction"] == pytest.approx(0.75)
    assert summary["total_s"] == pytest.approx(56.0)
    assert summary["weight_version"] == 6
    assert summary["median_paused_s"] is None
    # On for ticks 0, 4 and 5 of 6, each of 10 steps; the last record has no successor.
    # Each batch switches off and on once.
    assert summary["speculation_on_fraction"] == pytest.approx(170 / 350)
    assert summary["num_speculation_switches"] == 12


@pytest.mark.parametrize(
    "missing",
    ["config.yaml", "metrics.jsonl", "events.jsonl", "speculation.jsonl", "rollouts.jsonl"],
)
def test_a_report_is_built_without(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    assert build_report(run_dir).exists()


def test_an_empty_run_gets_a_page_that_says_so(tmp_path: Path) -> None:
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "nothing to plot" in page
    assert list((tmp_path / "plots").iterdir()) == []


def test_cut_and_foreign_lines_are_skipped(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "speculation.jsonl", "rollouts.jsonl"):
        with (run_dir / name).open("a", encoding="utf-8") as file:
            file.write('[1]\n\nnot json\n{"unrelated": true}\n{"step": 7, "rew')
    build_report(run_dir)
    assert summarize(read_run(run_dir)).num_steps == 6


def test_the_later_record_of_a_step_that_was_done_again_counts(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "reward/mean": 9.0}\n')
    run = read_run(run_dir)
    assert len(run.metrics) == 7
    assert run.values("reward/mean")[-1] == 9.0


def test_a_single_step_without_speculation_is_plotted(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.0, "phase/train_s": 1}])
    build_report(tmp_path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"reward.png", "phases.png"}


def test_decisions_from_before_the_first_event_are_not_plotted(run_dir: Path) -> None:
    write_lines(run_dir / "events.jsonl", [{"time_s": 5000.0, "event": "eval_start", "step": 0}])
    build_report(run_dir)
    names = {path.name for path in (run_dir / "plots").iterdir()}
    assert names.isdisjoint({"speculation.png", "timeline.png", "timeline_zoom.png"})


def test_a_missing_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        build_report(tmp_path / "absent")


def decision(time_s: float, step: int, draft: int, engine_id: str = "engine-0") -> Decision:
    return Decision(
        engine_id=engine_id, time_s=time_s, step=step, num_speculative_tokens=draft,
        kv_cache_usage=0.5, reason="",
    )  # fmt: skip


def test_steps_between_two_records_belong_to_the_first() -> None:
    share = speculation_share([decision(0, 10, 3), decision(1, 14, 0), decision(2, 20, 0)])
    assert (share.num_steps_on, share.num_steps_off, share.num_switches) == (4, 6, 1)


def test_engines_are_counted_apart_and_a_restart_does_not_count_backwards() -> None:
    records = [decision(0, 0, 3, "a"), decision(0, 50, 0, "b"), decision(1, 10, 3, "a"),
               decision(1, 0, 0, "b"), decision(2, 5, 0, "b")]  # fmt: skip
    share = speculation_share(records)
    assert (share.num_steps_on, share.num_steps_off, share.num_switches) == (10, 5, 0)


def test_an_idle_gap_splits_the_curve_and_ends_the_shade() -> None:
    records = [decision(t, int(t * 10), 3) for t in (0.0, 0.1, 0.2, 9.0, 9.1)]
    stretches = busy_stretches(records)
    assert [len(stretch) for stretch in stretches] == [3, 2]
    assert [on_intervals(stretch) for stretch in stretches] == [[(0.0, 0.2)], [(9.0, 9.1)]]


def test_the_close_up_shows_the_batch_with_the_most_switches() -> None:
    events = [
        Event(time_s=t, name=name, step=step)
        for step, t, name in [(1, 0, "rollout_start"), (1, 9, "rollout_end"), (2, 10, "eval_start"),
                              (2, 20, "rollout_start"), (2, 25, "rollout_end"),
                              (3, 30, "rollout_start")]
    ]  # fmt: skip
    windows = rollout_windows(events)
    assert windows == [(1, 0, 9), (2, 20, 25)]
    records = [decision(1, 1, 3), decision(2, 2, 3), decision(21, 3, 3), decision(22, 4, 0)]
    assert liveliest_window(records, windows) == (2, 20, 25)
    assert liveliest_window([], windows) is None


def test_batches_that_are_sampled_ahead_overlap() -> None:
    names = [(1, 0, "rollout_start"), (2, 1, "rollout_start"), (1, 4, "rollout_end"),
             (3, 5, "rollout_start"), (2, 9, "rollout_end")]  # fmt: skip
    events = [Event(time_s=t, name=name, step=step) for step, t, name in names]
    assert rollout_windows(events) == [(1, 0, 4), (2, 1, 9)]


def test_the_summary_says_how_much_sampling_was_hidden_and_how_old_policies_were(
    tmp_path: Path,
) -> None:
    records = [
        {"step": 1, "rollout/sample_s": 2.0, "rollout/hidden_fraction": 0.0, "lag/max": 0,
         "lag/mean": 0.0, "phase/rollout_s": 2.0, "phase/train_s": 1.0},
        {"step": 2, "rollout/sample_s": 6.0, "rollout/hidden_fraction": 0.5, "lag/max": 2,
         "lag/mean": 1.5, "phase/rollout_s": 3.0, "phase/train_s": 4.0},
    ]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", records)
    summary = summarize(read_run(tmp_path))
    assert summary.hidden_sampling_fraction == pytest.approx(3 / 8)
    assert summary.rollout_time_fraction == pytest.approx(0.5)
    assert (summary.mean_policy_lag, summary.max_policy_lag) == (0.75, 2)
    rows = dict(summary.rows())
    assert rows["sampling hidden behind training"] == "38%"
    assert rows["policy lag in updates"] == "0.75, at most 2"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (4.25, "4.2 s"), (59.99, "60.0 s"), (65, "1 min 05 s"), (3720, "1 h 02 min")],
)
def test_durations_are_readable(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
