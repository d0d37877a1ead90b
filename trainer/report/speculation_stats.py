"""Pure figures from the recorded decisions: how much of the time engines drafted, and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

from shared.config.run import RunConfig
from trainer.report.run_data import Decision, Event

IDLE_GAP_FACTOR = 10.0
MIN_IDLE_GAP_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationShare:
    """Engine steps with and without speculation."""

    num_steps_on: int
    num_steps_off: int
    num_switches: int

    @property
    def fraction_on(self) -> float | None:
        total = self.num_steps_on + self.num_steps_off
        return self.num_steps_on / total if total else None


def by_engine(decisions: Iterable[Decision]) -> dict[str, list[Decision]]:
    """Decisions per engine, in order of time."""
    grouped: dict[str, list[Decision]] = {}
    for decision in decisions:
        grouped.setdefault(decision.engine_id, []).append(decision)
    return dict(sorted(grouped.items()))


def speculation_share(decisions: Iterable[Decision]) -> SpeculationShare:
    """Steps on and off over all engines.

    Every switch is recorded, so the steps between two records were decided like the first of them:
    records at steps 10 (on), 14 (off), 20 (off) are 4 steps on and 6 steps off, one switch.
    """
    num_on = num_off = num_switches = 0
    for records in by_engine(decisions).values():
        for earlier, later in pairwise(records):
            num_steps = max(0, later.step - earlier.step)
            num_on += num_steps if earlier.is_on else 0
            num_off += 0 if earlier.is_on else num_steps
            num_switches += earlier.is_on != later.is_on
    return SpeculationShare(num_steps_on=num_on, num_steps_off=num_off, num_switches=num_switches)


def busy_stretches(records: Sequence[Decision]) -> list[list[Decision]]:
    """One engine's records split where it stood idle, so that plots do not bridge the gaps."""
    if len(records) < 2:
        return [list(records)] if records else []
    gaps_s = [later.time_s - earlier.time_s for earlier, later in pairwise(records)]
    limit_s = max(MIN_IDLE_GAP_S, IDLE_GAP_FACTOR * median(gaps_s))
    stretches = [[records[0]]]
    for gap_s, record in zip(gaps_s, records[1:], strict=True):
        if gap_s > limit_s:
            stretches.append([])
        stretches[-1].append(record)
    return stretches


def on_intervals(stretch: Sequence[Decision]) -> list[tuple[float, float]]:
    """Unix-time intervals of a busy stretch in which speculation was on."""
    intervals: list[tuple[float, float]] = []
    for earlier, later in pairwise(stretch):
        if not earlier.is_on:
            continue
        if intervals and intervals[-1][1] == earlier.time_s:
            intervals[-1] = (intervals[-1][0], later.time_s)
        else:
            intervals.append((earlier.time_s, later.time_s))
    return intervals


def rollout_windows(events: Iterable[Event]) -> list[tuple[int | None, float, float]]:
    """``(step, start, end)`` of every batch of rollouts, Unix seconds, in order of ending.

    Batches that are sampled ahead overlap. What a process that was killed had begun counts from
    where the next one began it again.
    """
    windows = []
    started_s: dict[int | None, float] = {}
    for event in events:
        if event.name == "rollout_start":
            started_s[event.step] = event.time_s
        elif event.name == "rollout_end" and event.step in started_s:
            windows.append((event.step, started_s.pop(event.step), event.time_s))
    return windows


def liveliest_window(
    decisions: Sequence[Decision], windows: Sequence[tuple[int | None, float, float]]
) -> tuple[int | None, float, float] | None:
    """The batch with the most switches, the longest of equals; None without any records in one."""
    best: tuple[int, float, tuple[int | None, float, float]] | None = None
    for window in windows:
        _, start_s, end_s = window
        inside = [d for d in decisions if start_s <= d.time_s <= end_s]
        if len(inside) < 2:
            continue
        score = (speculation_share(inside).num_switches, end_s - start_s, window)
        if best is None or score[:2] > best[:2]:
            best = score
    return best[2] if best else None


def kv_threshold(config: RunConfig | None) -> float | None:
    """The gate's threshold as a fraction of the KV blocks, as the run was started with.

    None where it cannot be told: given in tokens, with a pool whose size vLLM chose.
    """
    if config is None:
        return None
    tokens = config.speculation.kv_cache_threshold_tokens
    if tokens is None:
        return config.speculation.kv_cache_threshold
    num_blocks, block_size = config.engine.num_kv_blocks, config.engine.block_size
    return None if not num_blocks or not block_size else min(tokens / (num_blocks * block_size), 1)


def tokens_per_s(decisions: Iterable[Decision], edges_s: Sequence[float]) -> list[float] | None:
    """Tokens that all engines generated per second between each two edges: [len(edges_s) - 1].

    None if the run did not record them. Between two records of an engine its tokens are spread
    evenly; a counter that falls belongs to an engine that was replaced and began anew.
    """
    rates = np.zeros(len(edges_s) - 1)
    recorded = False
    for records in by_engine(decisions).values():
        counted = [r for r in records if r.num_generated_tokens is not None]
        counts = np.array([float(r.num_generated_tokens or 0) for r in counted])
        if len(counts) < 2:
            continue
        recorded = True
        grown = np.concatenate([[0.0], np.cumsum(np.maximum(np.diff(counts), 0.0))])
        at_edges = np.interp(edges_s, [record.time_s for record in counted], grown)
        rates += np.diff(at_edges) / np.diff(edges_s)
    return [float(rate) for rate in rates] if recorded else None
