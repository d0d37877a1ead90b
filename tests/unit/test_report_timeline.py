"""KV occupancy, draft length and throughput over time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.config.loading import load_run_config
from trainer.report.run_data import Decision, Event, RunData
from trainer.report.speculation_stats import kv_threshold, tokens_per_s
from trainer.report.style import plot_style
from trainer.report.timeline_plots import plot_timeline, plot_timeline_zoom


def decision(time_s: float, tokens: int | None, engine_id: str = "a", k: int = 2) -> Decision:
    return Decision(
        engine_id=engine_id,
        step=int(time_s * 10),
        time_s=time_s,
        kv_cache_usage=0.3,
        num_speculative_tokens=k,
        reason="predicted_faster",
        num_generated_tokens=tokens,
    )


def run_of(decisions: list[Decision], overrides: list[str] | None = None) -> RunData:
    config = load_run_config(None, ["model.path=m", *(overrides or [])], {})
    return RunData(
        run_dir=Path("runs/x"),
        config=config,
        config_text="",
        metrics=[{"step": 1, "rollout/tokens_per_s": 30.0}],
        decisions=decisions,
        events=[
            Event(time_s=0.0, name="rollout_start", step=1),
            Event(time_s=4.0, name="rollout_end", step=1),
        ],
        samples=[],
    )


def test_throughput_is_the_growth_of_every_engines_counter() -> None:
    records = [decision(t, tokens) for t, tokens in ((0, 0), (1, 100), (2, 100), (4, 300))]
    assert tokens_per_s(records, [0, 1, 2, 4]) == pytest.approx([100, 0, 100])
    both = [*records, decision(0, 50, "b"), decision(4, 90, "b")]
    assert tokens_per_s(both, [0, 1, 2, 4]) == pytest.approx([110, 10, 110])


def test_a_replaced_engine_counts_from_its_own_beginning() -> None:
    records = [decision(0, 900), decision(1, 1000), decision(2, 0), decision(3, 50)]
    assert tokens_per_s(records, [0, 1, 2, 3]) == pytest.approx([100, 0, 50])


def test_outside_of_what_was_recorded_nothing_was_generated() -> None:
    assert tokens_per_s([decision(1, 0), decision(2, 10)], [0, 1, 2, 3]) == pytest.approx(
        [0, 10, 0]
    )


def test_runs_that_did_not_record_tokens_say_so() -> None:
    assert tokens_per_s([decision(0, None), decision(1, None)], [0, 1]) is None


@pytest.mark.parametrize(
    ("overrides", "threshold"),
    [
        ([], 0.5),
        (["speculation.kv_cache_threshold_tokens=400"], None),
        (
            [
                *("speculation.kv_cache_threshold_tokens=400", "engine.num_kv_blocks=100"),
                "engine.block_size=16",
            ],
            0.25,
        ),
    ],
)
def test_the_threshold_is_drawn_where_it_can_be_told(
    overrides: list[str], threshold: float | None
) -> None:
    assert kv_threshold(run_of([], overrides).config) == threshold


@pytest.mark.parametrize("engines", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("with_tokens", [True, False])
def test_both_plots_are_drawn_for_any_number_of_engines(
    engines: list[str], with_tokens: bool, tmp_path: Path
) -> None:
    records = [
        decision(0.1 * tick, 10 * tick if with_tokens else None, engine, tick % 3)
        for tick in range(40)
        for engine in engines
    ]
    with plot_style():
        assert plot_timeline(run_of(records), tmp_path) == tmp_path / "timeline.png"
        assert plot_timeline_zoom(run_of(records), tmp_path) == tmp_path / "timeline_zoom.png"
    assert (tmp_path / "timeline.png").stat().st_size > 5000


def test_without_decisions_there_is_no_plot(tmp_path: Path) -> None:
    assert plot_timeline(run_of([]), tmp_path) is None
    assert plot_timeline_zoom(replace(run_of([]), events=[]), tmp_path) is None
