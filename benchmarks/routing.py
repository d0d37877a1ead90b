"""Is the router's choice better than round robin? In simulated time, with skewed lengths.

The choice is the server's own function (``router/strategy.py``), engines are formulas. Each
scenario is drawn with several seeds, and within a seed every policy gets the same groups. A batch
is a training step: what counts is when its last group is done. Arrivals are many callers at 80 % of
what the engines can do: what counts is the mean and the 95th percentile of a group's latency.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.routing_simulation import (
    FewestSamples,
    FewestTokens,
    RoundRobin,
    RoutingPolicy,
    SimulatedEngine,
    SimulatedGroup,
    simulate,
)

OURS = "fewest_tokens"
POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    OURS: FewestTokens,
    "round_robin": lambda: RoundRobin(blind=True),
    "round_robin_with_room": lambda: RoundRobin(blind=False),
    "fewest_samples": FewestSamples,
}
ENGINE = SimulatedEngine(step_s=0.012, step_s_per_sequence=0.0002, max_num_seqs=64)
NUM_ENGINES = 4
MEDIAN_TOKENS = 300
MAX_TOKENS = 4096
LOAD = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Engines, and how groups come."""

    name: str
    engines: tuple[SimulatedEngine, ...]
    is_batch: bool
    mixed: bool = False
    """Half of the groups are single short answers, as evaluations and chats are."""
    num_groups: int = 256
    n: int = 8


SAME = (ENGINE,) * NUM_ENGINES
SLOW = SimulatedEngine(step_s=0.024, step_s_per_sequence=0.0004, max_num_seqs=64)
LATE = SimulatedEngine(step_s=0.012, step_s_per_sequence=0.0002, max_num_seqs=64, joins_at_s=10.0)
SCENARIOS = (
    Scenario(name="batch", engines=SAME, is_batch=True),
    Scenario(name="batch, one engine half as fast", engines=(*SAME[1:], SLOW), is_batch=True),
    Scenario(name="batch, one engine joins late", engines=(*SAME[1:], LATE), is_batch=True),
    Scenario(name="batch, mixed groups", engines=SAME, is_batch=True, mixed=True),
    Scenario(name="arrivals", engines=SAME, is_batch=False, num_groups=1024),
    Scenario(
        name="arrivals, one engine half as fast",
        engines=(*SAME[1:], SLOW),
        is_batch=False,
        num_groups=1024,
    ),
    Scenario(name="arrivals, mixed groups", engines=SAME, is_batch=False, mixed=True,
             num_groups=2048),
)  # fmt: skip


def draw_groups(scenario: Scenario, seed: int) -> list[SimulatedGroup]:
    """Lengths are log-normal: prompts differ, and so do the samples of one."""
    draw = random.Random(seed)
    shapes: list[tuple[tuple[int, ...], int]] = []
    for _ in range(scenario.num_groups):
        is_short = scenario.mixed and draw.random() < 0.5
        max_tokens = 64 if is_short else MAX_TOKENS
        typical = draw.lognormvariate(0.0, 0.8) * (24 if is_short else MEDIAN_TOKENS)
        lengths = tuple(
            max(1, min(round(typical * draw.lognormvariate(0.0, 0.5)), max_tokens))
            for _ in range(1 if is_short else scenario.n)
        )
        shapes.append((lengths, max_tokens))
    rate = 0.0
    if not scenario.is_batch:
        num_tokens = sum(sum(lengths) for lengths, _ in shapes)
        rate = LOAD * capacity_tokens_per_s(scenario.engines) * len(shapes) / num_tokens
    now_s = 0.0
    groups = []
    for lengths, max_tokens in shapes:
        now_s += draw.expovariate(rate) if rate else 0.0
        groups.append(SimulatedGroup(arrives_at_s=now_s, lengths=lengths, max_tokens=max_tokens))
    return groups


def capacity_tokens_per_s(engines: Sequence[SimulatedEngine]) -> float:
    """With every place taken."""
    return sum(
        e.max_num_seqs / (e.step_s + e.step_s_per_sequence * (e.max_num_seqs - 1)) for e in engines
    )


def figures(groups: Sequence[SimulatedGroup], done_s: Sequence[float]) -> dict[str, float]:
    latencies = sorted(
        done - group.arrives_at_s for group, done in zip(groups, done_s, strict=True)
    )
    return {
        "makespan_s": max(done_s) - groups[0].arrives_at_s,
        "mean_latency_s": statistics.fmean(latencies),
        "p95_latency_s": latencies[int(len(latencies) * 0.95)],
    }


def measure(scenario: Scenario, seeds: Sequence[int]) -> list[dict[str, dict[str, float]]]:
    """Per seed, the figures of every policy."""
    rounds = []
    for seed in seeds:
        groups = draw_groups(scenario, seed)
        rounds.append(
            {
                name: figures(groups, simulate(groups, scenario.engines, make()))
                for name, make in POLICIES.items()
            }
        )
    return rounds


def summarize(scenario: Scenario, rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """By how much each other policy takes longer than the server's, within a seed."""
    names = ("makespan_s",) if scenario.is_batch else ("mean_latency_s", "p95_latency_s")
    point: dict[str, Any] = {"scenario": scenario.name}
    for name in names:
        point[name] = {
            policy: round(statistics.median(r[policy][name] for r in rounds), 3)
            for policy in POLICIES
        }
        for policy in POLICIES.keys() - {OURS}:
            ratios = [r[policy][name] / r[OURS][name] for r in rounds]
            point[f"{name.removesuffix('_s')}_ratio_{policy}"] = {
                "median": round(statistics.median(ratios), 3),
                "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            }
    return point


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=15)
    options = parser.parse_args()
    points, raw = [], {}
    for scenario in SCENARIOS:
        raw[scenario.name] = measure(scenario, range(options.seeds))
        points.append(summarize(scenario, raw[scenario.name]))
        print(points[-1], file=sys.stderr)
    result = {"bench": "routing", "seeds": options.seeds, "policy": OURS, "points": points}
    write_result(result, raw)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
