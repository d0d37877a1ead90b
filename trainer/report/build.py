"""Writes the report of a run: PNG plots, a self-contained ``report.html`` and ``summary.json``."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.report.plots import (
    plot_acceptance,
    plot_accuracy,
    plot_phases,
    plot_reward,
    plot_throughput,
)
from trainer.report.run_data import RunData, read_run
from trainer.report.speculation_plots import plot_speculation
from trainer.report.style import plot_style
from trainer.report.summary import RunSummary, summarize
from trainer.report.timeline_plots import plot_timeline, plot_timeline_zoom

Plot = Callable[[RunData, Path], Path | None]

PLOTS: tuple[tuple[Plot, str], ...] = (
    (plot_reward, "Mean reward of the samples of each step."),
    (plot_accuracy, "Greedy answers to problems that are never trained on."),
    (plot_speculation, "Engines draft (green) only while their KV cache is less full than the "
     "threshold; dotted lines are training steps."),
    (plot_timeline, "What the scheduler sees (KV occupancy), what it decides (draft length, 0 is "
     "plain decoding) and what comes of it (throughput), on one time axis."),
    (plot_timeline_zoom, "The same for the batch in which speculation switched most often."),
    (plot_acceptance, "Tokens a verification step yields while engines draft; every weight push "
     "rebuilds the drafter, so it keeps up with the policy."),
    (plot_throughput, "Completion tokens per second of each batch while it was sampled, and their "
     "lengths."),
    (plot_phases, "Seconds of each training step by phase; rollout is the time the trainer waited "
     "for its batch."),
)  # fmt: skip


def build_report(run_dir: Path) -> Path:
    """Build everything from what the run recorded, however little that is.

    Returns:
        The path of ``report.html``.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run directory {run_dir}")
    run = read_run(run_dir)
    summary = summarize(run)
    plot_dir = run_dir / "plots"
    plot_dir.mkdir(exist_ok=True)
    images = []
    for plot, caption in PLOTS:
        with plot_style():
            path = plot(run, plot_dir)
        if path is not None:
            images.append((inline_png(path), caption))
    summary_text = json.dumps(summary.to_json(), indent=2)
    (run_dir / "summary.json").write_text(summary_text + "\n", encoding="utf-8")
    report_path = run_dir / "report.html"
    report_path.write_text(render_html(run, summary, images), encoding="utf-8")
    return report_path


def inline_png(path: Path) -> str:
    """A ``data:`` address, so that the report is one file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def render_html(run: RunData, summary: RunSummary, images: list[tuple[str, str]]) -> str:
    """The page. Prompts and completions are model output: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("trainer.report", ""), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html").render(
        name=run.run_dir.name,
        rows=summary.rows(),
        images=images,
        samples=run.samples,
        config_text=run.config_text,
    )
