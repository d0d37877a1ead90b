"""``python -m trainer.progress RUN_DIR``: the live view of a run, in a process of its own.

Follows the files the trainer writes, so it can be started and stopped at any time and costs the
run nothing. On a terminal it redraws one panel; elsewhere it prints one line per step. It ends on
SIGTERM or Ctrl-C, when the process ``--pid`` is gone, or with ``--once`` after one look.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shared.config.run import RunConfig
from trainer.report.jsonl import JsonlTail, JsonRecord, number, text
from trainer.report.run_data import Decision, parse_decision, read_config

REFRESH_S = 0.5
SPARK_LEVELS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
PHASES = {
    "wait": "waiting for rollouts",
    "train": "training",
    "push": "pushing weights",
    "eval": "evaluating",
}
NO_PHASES = ("starting", "between phases")


@dataclass(slots=True)
class EngineView:
    """Latest decision of one engine, and its steps with and without speculation so far."""

    latest: Decision
    num_steps_on: int = 0
    num_steps_off: int = 0

    def add(self, decision: Decision) -> None:
        """Count the steps since the latest decision, which decided them."""
        num_steps = max(0, decision.step - self.latest.step)
        if self.latest.is_on:
            self.num_steps_on += num_steps
        else:
            self.num_steps_off += num_steps
        self.latest = decision

    @property
    def on_fraction(self) -> float:
        return self.num_steps_on / max(1, self.num_steps_on + self.num_steps_off)


@dataclass(slots=True)
class ProgressState:
    """What the view shows; grows with every record."""

    num_steps: int | None
    threshold: float | None
    latest: dict[str, object] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=SPARK_WIDTH))
    phase: str = NO_PHASES[0]
    """Of the training loop."""
    sampled_steps: set[float | None] = field(default_factory=set)
    """Steps whose batch is being sampled, beside the loop where batches are sampled ahead."""
    engines: dict[str, EngineView] = field(default_factory=dict)

    @property
    def activity(self) -> str:
        """What the loop does, and what is sampled meanwhile."""
        if not self.sampled_steps:
            return self.phase
        count = len(self.sampled_steps)
        if count == 1 and self.phase == PHASES["wait"]:
            return self.phase
        sampling = "sampling rollouts" if count == 1 else f"sampling {count} batches"
        return sampling if self.phase in NO_PHASES else f"{self.phase}, {sampling}"

    def add_metrics(self, record: JsonRecord) -> None:
        """A finished step. Values that are not measured every step stay until replaced."""
        self.latest.update(record)
        reward = number(record, "reward/mean")
        if reward is not None:
            self.rewards.append(reward)

    def add_event(self, record: JsonRecord) -> None:
        """A phase began or ended."""
        name, _, edge = text(record, "event").rpartition("_")
        step = number(record, "step")
        if name == "rollout" and edge == "start":
            self.sampled_steps.add(step)
        elif name == "rollout":
            self.sampled_steps.discard(step)
        elif edge == "start":
            self.phase = PHASES.get(name, name)
        elif edge == "end":
            self.phase = NO_PHASES[1]

    def add_decision(self, record: JsonRecord) -> None:
        """An engine's scheduler reported."""
        decision = parse_decision(record)
        if decision is None:
            return
        view = self.engines.get(decision.engine_id)
        if view is None:
            self.engines[decision.engine_id] = EngineView(latest=decision)
        else:
            view.add(decision)


class RunFollower:
    """Feeds the state from the files of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        config: RunConfig | None = read_config(run_dir / "config.yaml")
        self.state = ProgressState(
            num_steps=config.trainer.num_steps if config else None,
            threshold=config.speculation.kv_cache_threshold if config else None,
        )
        self._metrics = JsonlTail(run_dir / "metrics.jsonl")
        self._events = JsonlTail(run_dir / "events.jsonl")
        self._decisions = JsonlTail(run_dir / "speculation.jsonl")

    def update(self) -> list[JsonRecord]:
        """Read what is new; returns the new steps."""
        for record in self._events.read_new():
            self.state.add_event(record)
        for record in self._decisions.read_new():
            self.state.add_decision(record)
        new_steps = self._metrics.read_new()
        for record in new_steps:
            self.state.add_metrics(record)
        return new_steps


def sparkline(values: Sequence[float]) -> str:
    """One block character per value, scaled between the smallest and the largest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = high - low
    top = len(SPARK_LEVELS) - 1
    return "".join(
        SPARK_LEVELS[round((value - low) / span * top) if span > 0 else 0] for value in values
    )


def show(record: Mapping[str, object], key: str, pattern: str, unit: str = "") -> str:
    """A formatted metric; a dash until it has been measured."""
    value = number(record, key)
    return "–" if value is None else f"{value:{pattern}}{unit}"


LINE_PARTS = (
    ("step", "step ", ".0f", ""),
    ("reward/mean", "reward ", ".3f", ""),
    ("eval/accuracy", "accuracy ", ".1%", ""),
    ("rollout/tokens_per_s", "tokens/s ", ",.0f", ""),
    ("rollout/mean_acceptance_length", "acceptance length ", ".2f", ""),
    ("weights/version", "weights v", ".0f", ""),
    ("weights/push_s", "push ", ".2f", " s"),
)


def plain_line(record: JsonRecord) -> str:
    """One step as a log line: what was measured in it."""
    return "  ".join(
        label + show(record, key, pattern, unit)
        for key, label, pattern, unit in LINE_PARTS
        if number(record, key) is not None
    )


def render(state: ProgressState) -> RenderableType:
    """The whole panel."""
    latest = state.latest
    step = number(latest, "step") or 0.0
    total = state.num_steps or max(1.0, step)
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    head.add_row(
        f"[bold]step {step:.0f}[/] / {state.num_steps if state.num_steps is not None else '?'}",
        ProgressBar(total=total, completed=step),
        f"[cyan]{state.activity}[/]",
    )
    facts = Table.grid(padding=(0, 3))
    facts.add_row(
        f"reward [bold]{show(latest, 'reward/mean', '.3f')}[/]",
        f"accuracy [bold]{show(latest, 'eval/accuracy', '.1%')}[/]",
        f"tokens/s [bold]{show(latest, 'rollout/tokens_per_s', ',.0f')}[/]",
        f"acceptance length [bold]{show(latest, 'rollout/mean_acceptance_length', '.2f')}[/]",
    )
    facts.add_row(
        f"weights [bold]v{show(latest, 'weights/version', '.0f')}[/]",
        f"push [bold]{show(latest, 'weights/push_s', '.3f', ' s')}[/]",
        f"paused [bold]{show(latest, 'weights/paused_s', '.3f', ' s')}[/]",
        f"longest [bold]{show(latest, 'rollout/max_completion_tokens', '.0f')}[/] tokens",
    )
    if (number(latest, "lag/max") or 0) > 0:
        facts.add_row(
            f"policy lag [bold]{show(latest, 'lag/mean', '.2f')}[/] updates",
            f"largest [bold]{show(latest, 'lag/max', '.0f')}[/]",
            f"waited [bold]{show(latest, 'phase/rollout_s', '.1f', ' s')}[/]",
            f"sampling hidden [bold]{show(latest, 'rollout/hidden_fraction', '.0%')}[/]",
        )
    rewards = Text.assemble(("reward ", "dim"), (sparkline(state.rewards), "green"))
    parts: list[RenderableType] = [head, facts, rewards]
    if state.engines:
        parts.append(render_engines(state))
    return Panel(Group(*parts), title="slipstream", title_align="left", border_style="cyan")


def render_engines(state: ProgressState) -> Table:
    """KV occupancy as a bar, green while the engine drafts, with the threshold beside it."""
    table = Table.grid(padding=(0, 2))
    for engine_id, view in sorted(state.engines.items()):
        latest = view.latest
        colour = "green" if latest.is_on else "yellow"
        bar = ProgressBar(total=1.0, completed=latest.kv_cache_usage, width=30,
                          complete_style=colour, finished_style=colour)  # fmt: skip
        limit = f" of {state.threshold:.0%}" if state.threshold is not None else ""
        drafting = f"drafts {latest.num_speculative_tokens}" if latest.is_on else "does not draft"
        table.add_row(
            engine_id,
            bar,
            f"KV {latest.kv_cache_usage:.0%}{limit}",
            f"[{colour}]{drafting}[/] [dim]({latest.reason})[/]",
            f"on {view.on_fraction:.0%} of steps",
        )
    return table


def follow(run_dir: Path, *, once: bool, pid: int | None) -> None:
    """Show the run until a signal comes or process ``pid`` is gone (or once)."""
    console = Console()
    follower = RunFollower(run_dir)
    stopped = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopped.set())

    def is_ending() -> bool:
        gone = pid is not None and not psutil.pid_exists(pid)
        return once or gone or stopped.wait(REFRESH_S)

    # Each loop reads once more after the end: the last step is written just before it.
    ending = False
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while not ending:
                ending = is_ending()
                follower.update()
                live.update(render(follower.state), refresh=True)
    while not ending:
        ending = is_ending()
        for record in follower.update():
            print(plain_line(record), flush=True)


def main() -> int:
    """Exit code 0; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description="Live view of a run.")
    parser.add_argument("run_dir", type=Path, help="such as runs/demo")
    parser.add_argument("--once", action="store_true", help="show the present state and leave")
    parser.add_argument("--pid", type=int, help="leave when this process is gone")
    arguments = parser.parse_args()
    follow(arguments.run_dir, once=arguments.once, pid=arguments.pid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
