"""Plots over training steps: reward, accuracy, acceptance length, throughput, time per phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.report.run_data import RunData
from trainer.report.style import BLUE, GREEN, MUTED, ORANGE, PHASE_COLOURS, new_figure, save
from trainer.report.summary import duration

SMOOTH_WINDOW_STEPS = 5


def plot_reward(run: RunData, directory: Path) -> Path | None:
    """Mean reward per step, its spread within the batch, and a moving average."""
    steps, means = run.column("reward/mean")
    if not steps:
        return None
    figure, [axes] = new_figure()
    spread_steps, stds = run.column("reward/std")
    if spread_steps == steps:
        low = [mean - std for mean, std in zip(means, stds, strict=True)]
        high = [mean + std for mean, std in zip(means, stds, strict=True)]
        axes.fill_between(
            steps, low, high, color=BLUE, alpha=0.12, lw=0, label="± 1 std of samples"
        )
    smooth = len(steps) >= 2 * SMOOTH_WINDOW_STEPS
    axes.plot(steps, means, color=BLUE, lw=1 if smooth else 2, alpha=0.5 if smooth else 1.0,
              marker="o", ms=3, label="mean of the batch")  # fmt: skip
    if smooth:
        label = f"moving average, {SMOOTH_WINDOW_STEPS} steps"
        axes.plot(steps, moving_average(means), color=BLUE, lw=2.2, label=label)
    finish_step_axis(axes, "Reward", "reward")
    axes.legend(loc="best")
    return save(figure, directory / "reward.png")


def plot_accuracy(run: RunData, directory: Path) -> Path | None:
    """Held-out accuracy, where it was evaluated."""
    steps, values = run.column("eval/accuracy")
    if not steps:
        return None
    figure, [axes] = new_figure()
    axes.plot(steps, values, color=GREEN, lw=2, marker="o", ms=5)
    for step, value in {steps[0]: values[0], steps[-1]: values[-1]}.items():
        axes.annotate(f"{value:.0%}", (step, value), xytext=(0, 8), textcoords="offset points",
                      ha="center", color=GREEN, weight="bold")  # fmt: skip
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    finish_step_axis(axes, "Accuracy on held-out problems", "solved")
    return save(figure, directory / "accuracy.png")


def plot_acceptance(run: RunData, directory: Path) -> Path | None:
    """Mean acceptance length, against its highest possible value."""
    steps, values = run.column("rollout/mean_acceptance_length")
    drafted = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
    if not drafted:
        return None
    figure, [axes] = new_figure()
    axes.plot([s for s, _ in drafted], [v for _, v in drafted], color=BLUE, lw=2, marker="o", ms=3,
              label="mean acceptance length (with the bonus token)")  # fmt: skip
    highest = max(value for _, value in drafted)
    if run.config is not None:
        limit = run.config.speculation.num_speculative_tokens + 1
        axes.axhline(limit, color=ORANGE, ls="--", lw=1.4, label=f"all drafts accepted: {limit}")
        highest = max(highest, limit)
    axes.axhline(1, color=MUTED, ls=":", lw=1.4, label="plain decoding: 1")
    axes.set_ylim(0.8, highest + 0.35)
    finish_step_axis(axes, "Tokens gained per verification while drafting", "tokens")
    axes.legend(loc="best")
    return save(figure, directory / "acceptance.png")


def plot_throughput(run: RunData, directory: Path) -> Path | None:
    """Completion tokens per second of each batch, and how long completions are."""
    steps, rates = run.column("rollout/tokens_per_s")
    if not steps:
        return None
    figure, [top, bottom] = new_figure(2, 2.6)
    top.plot(steps, rates, color=BLUE, lw=2, marker="o", ms=3)
    top.set_ylim(bottom=0)
    finish_step_axis(top, "Rollout throughput", "tokens / s")
    top.set_xlabel("")
    for key, label, colour in (
        ("rollout/max_completion_tokens", "longest", ORANGE),
        ("rollout/mean_completion_tokens", "mean", BLUE),
    ):
        length_steps, lengths = run.column(key)
        if lengths:
            bottom.plot(length_steps, lengths, color=colour, lw=1.8, marker="o", ms=3, label=label)
    bottom.set_ylim(bottom=0)
    finish_step_axis(bottom, "Completion length", "tokens")
    if bottom.lines:
        bottom.legend(loc="best", ncols=2)
    return save(figure, directory / "throughput.png")


def plot_phases(run: RunData, directory: Path) -> Path | None:
    """Where the seconds of each step went, stacked."""
    columns = {name: dict(zip(*run.column(f"phase/{name}_s"), strict=True))
               for name in PHASE_COLOURS}  # fmt: skip
    steps = sorted({step for column in columns.values() for step in column})
    if not steps:
        return None
    figure, [axes] = new_figure()
    floor = np.zeros(len(steps))
    for name, column in columns.items():
        if not column:
            continue
        heights = np.array([column.get(step, 0.0) for step in steps])
        label = f"{name} ({duration(float(heights.sum()))})"
        axes.bar(steps, heights, 0.85, bottom=floor, color=PHASE_COLOURS[name], label=label)
        floor += heights
    finish_step_axis(axes, "Time per phase", "seconds")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", ncols=len(columns), bbox_to_anchor=(0, -0.16))
    return save(figure, directory / "phases.png")


def moving_average(values: list[float]) -> list[float]:
    """Mean of each value and up to ``SMOOTH_WINDOW_STEPS - 1`` before it."""
    window = SMOOTH_WINDOW_STEPS
    return [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]


def finish_step_axis(axes: Axes, title: str, unit: str) -> None:
    """Title and labels of a plot over training steps."""
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
