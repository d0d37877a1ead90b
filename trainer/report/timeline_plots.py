"""KV occupancy, draft length and throughput on one time axis: the whole run, and one batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.report.run_data import Decision, RunData
from trainer.report.speculation_plots import mark_steps, whole_run
from trainer.report.speculation_stats import (
    busy_stretches,
    by_engine,
    kv_threshold,
    liveliest_window,
    on_intervals,
    rollout_windows,
    tokens_per_s,
)
from trainer.report.style import BLUE, ENGINE_COLOURS, GREEN, INK, ORANGE, SHADE, new_figure, save

PANEL_HEIGHT_IN = 1.9
ZOOM_MARGIN = 0.04
MAX_INTERVALS = 240
MIN_INTERVAL_S = 0.1
"""Throughput is averaged over intervals of at least this: records are some 20 ms apart."""


def plot_timeline(run: RunData, directory: Path) -> Path | None:
    """The whole run."""
    span = whole_run(run)
    if span is None:
        return None
    return draw(run, span, "The scheduler over the run", directory / "timeline.png")


def plot_timeline_zoom(run: RunData, directory: Path) -> Path | None:
    """The batch in which speculation switched most often, as long as its engines worked."""
    window = liveliest_window(run.decisions, rollout_windows(run.events))
    if window is None:
        return None
    step, start_s, end_s = window
    last_s = max(d.time_s for d in run.decisions if d.time_s <= end_s)
    margin_s = ZOOM_MARGIN * (last_s - start_s)
    title = f"The scheduler in one batch of rollouts (training step {step})"
    span = (start_s - margin_s, last_s + margin_s)
    return draw(run, span, title, directory / "timeline_zoom.png")


def draw(run: RunData, span: tuple[float, float], title: str, path: Path) -> Path | None:
    """Three panels; time in seconds since the start of ``span``. None without records in it."""
    inside = [d for d in run.decisions if span[0] <= d.time_s <= span[1]]
    engines = by_engine(inside)
    if not engines:
        return None
    figure, [usage, length, rate] = new_figure(3, PANEL_HEIGHT_IN)
    colours = [BLUE] if len(engines) == 1 else ENGINE_COLOURS
    for index, (engine_id, records) in enumerate(engines.items()):
        colour = colours[index % len(colours)]
        draw_engine(usage, length, records, span[0], colour, engine_id)
        if len(engines) == 1:
            shade_drafting((usage, length, rate), records, span[0])
    threshold = kv_threshold(run.config)
    if threshold is not None:
        colour = ORANGE if len(engines) == 1 else INK
        usage.axhline(threshold, color=colour, ls="--", lw=1.4, label=f"threshold {threshold:.0%}")
    usage.set_ylim(0, 1.02)
    usage.yaxis.set_major_formatter(PercentFormatter(1.0))
    usage.set_ylabel("KV blocks in use")
    length.set_ylim(-0.25, max(d.num_speculative_tokens for d in inside) + 0.5)
    length.yaxis.set_major_locator(MaxNLocator(integer=True))
    length.set_ylabel("draft length K")
    draw_throughput(rate, run, inside, span, GREEN if len(engines) == 1 else INK)
    for axes in (usage, length, rate):
        mark_steps(axes, run, span, numbered=axes is usage)
        axes.set_xlim(0, max(span[1] - span[0], 1e-3))
        axes.grid(axis="x", visible=False)
    usage.set_title(title, pad=18)
    rate.set_xlabel("seconds (green: the engine drafts)" if len(engines) == 1 else "seconds")
    if threshold is not None or len(engines) > 1:
        figure.legend(handles=usage.get_legend_handles_labels()[0], loc="outside lower center",
                      ncols=4)  # fmt: skip
    return save(figure, path)


def draw_engine(
    usage: Axes,
    length: Axes,
    records: list[Decision],
    origin_s: float,
    colour: str,
    engine_id: str,
) -> None:
    """One engine's occupancy and draft length; gaps where it was idle."""
    for index, stretch in enumerate(busy_stretches(records)):
        times = [record.time_s - origin_s for record in stretch]
        label = engine_id if index == 0 else None
        usage.plot(
            times, [record.kv_cache_usage for record in stretch], color=colour, lw=1.4, label=label
        )
        lengths = [record.num_speculative_tokens for record in stretch]
        length.step(times, lengths, where="post", color=colour, lw=1.2)


def shade_drafting(panels: tuple[Axes, ...], records: list[Decision], origin_s: float) -> None:
    """Where the only engine drafted, in every panel."""
    for stretch in busy_stretches(records):
        for start_s, end_s in on_intervals(stretch):
            for axes in panels:
                axes.axvspan(start_s - origin_s, end_s - origin_s, color=SHADE, lw=0, alpha=0.7)


def draw_throughput(
    axes: Axes, run: RunData, decisions: list[Decision], span: tuple[float, float], colour: str
) -> None:
    """Tokens per second of all engines; of whole batches where nothing finer was recorded."""
    seconds = max(span[1] - span[0], 1e-3)
    num_intervals = int(min(max(seconds / MIN_INTERVAL_S, 1), MAX_INTERVALS))
    edges = np.linspace(span[0], span[0] + seconds, num_intervals + 1)
    rates = tokens_per_s(decisions, [float(edge) for edge in edges])
    if rates is not None:
        axes.stairs(rates, edges - span[0], color=colour, lw=1.4)
        axes.set_ylabel("tokens / s,\nall engines" if colour == INK else "tokens / s")
    else:
        by_step = dict(zip(*run.column("rollout/tokens_per_s"), strict=True))
        for step, start_s, end_s in rollout_windows(run.events):
            if step is not None and step in by_step:
                left, right = start_s - span[0], end_s - span[0]
                axes.hlines(by_step[step], left, right, color=colour, lw=1.8)
        axes.set_ylabel("tokens / s\n(whole batches)")
    axes.set_ylim(bottom=0)
