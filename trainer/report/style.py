"""One look for all plots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")

INK = "#22313f"
MUTED = "#7f8c98"
BLUE = "#1f6fb2"
ORANGE = "#d9822b"
GREEN = "#2a9d6f"
SHADE = "#bfe5d3"
ENGINE_COLOURS = (
    "#1f6fb2",
    "#d9822b",
    "#2a9d6f",
    "#8e6bb8",
    "#c2484f",
    "#4aa3b5",
    "#8a7a3c",
    "#7f8c98",
)
PHASE_COLOURS = {
    "rollout": "#1f6fb2",
    "logprob": "#7fb3d9",
    "train": "#d9822b",
    "publish": "#2a9d6f",
    "eval": "#b7a6d6",
}
WIDTH_IN, HEIGHT_IN, DOTS_PER_INCH = 9.0, 3.6, 120

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Everything drawn inside has our look; matplotlib's own settings come back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcParams.update(RC)
        yield


def new_figure(num_rows: int = 1, height_in: float = HEIGHT_IN) -> tuple[Figure, list[Axes]]:
    """A figure of ``num_rows`` panels over one x axis."""
    figure = Figure(figsize=(WIDTH_IN, height_in * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, 1, sharex=True, squeeze=False)
    return figure, [row[0] for row in grid]


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG."""
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path
