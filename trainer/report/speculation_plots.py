"""KV occupancy of every engine over the run, shaded where it drafted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from trainer.report.run_data import Decision, RunData
from trainer.report.speculation_stats import (
    busy_stretches,
    by_engine,
    kv_threshold,
    on_intervals,
)
from trainer.report.style import BLUE, MUTED, ORANGE, SHADE, new_figure, save

MAX_ENGINES = 4
MAX_STEP_LABELS = 16


def plot_speculation(run: RunData, directory: Path) -> Path | None:
    """The whole run, without the engines' warm-up before it."""
    span = whole_run(run)
    if span is None:
        return None
    title = "KV-cache occupancy and speculation over the run"
    return draw(run, span, title, directory / "speculation.png")


def whole_run(run: RunData) -> tuple[float, float] | None:
    """From the first event to the last record, Unix seconds; None without decisions."""
    if not run.decisions:
        return None
    start_s, end_s = run.decisions[0].time_s, run.decisions[-1].time_s
    if run.events:
        start_s, end_s = run.events[0].time_s, max(end_s, run.events[-1].time_s)
    return start_s, end_s


def draw(run: RunData, span: tuple[float, float], title: str, path: Path) -> Path | None:
    """One panel per engine; time in seconds since the start of ``span``. None without records."""
    decisions = [d for d in run.decisions if span[0] <= d.time_s <= span[1]]
    engines = list(by_engine(decisions).items())
    if not engines:
        return None
    shown = engines[:MAX_ENGINES]
    threshold = kv_threshold(run.config)
    figure, panels = new_figure(len(shown), 3.6 if len(shown) < 2 else 2.3)
    for axes, (engine_id, records) in zip(panels, shown, strict=True):
        draw_engine(axes, records, span[0])
        if threshold is not None:
            axes.axhline(threshold, color=ORANGE, ls="--", lw=1.6)
        mark_steps(axes, run, span)
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, max(span[1] - span[0], 1e-3))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("KV blocks in use" if len(shown) < 2 else engine_id)
        axes.grid(axis="x", visible=False)
    more = len(engines) - len(shown)
    panels[0].set_title(title + (f" ({more} more engines not shown)" if more else ""), pad=18)
    panels[-1].set_xlabel("seconds")
    figure.legend(handles=legend_handles(threshold), loc="outside lower center", ncols=3)
    return save(figure, path)


def draw_engine(axes: Axes, records: Sequence[Decision], origin_s: float) -> None:
    """Occupancy of one engine, and the stretches in which it drafted."""
    for stretch in busy_stretches(records):
        times = [record.time_s - origin_s for record in stretch]
        usage = [record.kv_cache_usage for record in stretch]
        for start_s, end_s in on_intervals(stretch):
            axes.axvspan(start_s - origin_s, end_s - origin_s, color=SHADE, lw=0)
        axes.fill_between(times, usage, color=BLUE, alpha=0.10, lw=0)
        axes.plot(times, usage, color=BLUE, lw=1.6)


def mark_steps(
    axes: Axes, run: RunData, span: tuple[float, float], *, numbered: bool = True
) -> None:
    """A thin line where each training step sends its prompts, numbered on top."""
    starts = [
        event
        for event in run.events
        if event.name == "rollout_start" and span[0] <= event.time_s <= span[1]
    ]
    every = -(-len(starts) // MAX_STEP_LABELS) if starts else 1
    for index, event in enumerate(starts):
        x = event.time_s - span[0]
        axes.axvline(x, color=MUTED, lw=0.7, ls=":")
        if numbered and index % every == 0 and event.step is not None:
            axes.annotate(f"step {event.step}" if index == 0 else str(event.step), (x, 1.0),
                          xycoords=("data", "axes fraction"), xytext=(1, 3),
                          textcoords="offset points", fontsize=8, color=MUTED)  # fmt: skip


def legend_handles(threshold: float | None) -> list[Artist]:
    """Line, shade and threshold, explained."""
    handles: list[Artist] = [
        Line2D([], [], color=BLUE, lw=1.6, label="KV-cache occupancy"),
        Patch(facecolor=SHADE, label="speculation on"),
    ]
    if threshold is not None:
        text = f"threshold {threshold:.0%}"
        handles.append(Line2D([], [], color=ORANGE, ls="--", lw=1.6, label=text))
    return handles
