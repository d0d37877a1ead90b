"""What does HTTP cost? Against the engine alone, and by itself.

With a real engine (``medium-160m``): rollouts through the whole server (client, uvicorn, router,
Ray) against the same prompts given to the same engine inside its own process, at the same
concurrency, in turn. With engines that answer at once: how many requests of one group the server
answers per second, and where the CPU time of one goes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.bars import judged
from benchmarks.harness.engine_over_http import EnginePlan, compare_with_engine
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.server_cost import measure_cpu_parts, measure_requests_per_s

SIZES = {"n=8 x 64": (8, 64), "n=4 x 16": (4, 16), "n=8 x 512": (8, 512)}
"""Samples and tokens of a group. The first is what ``fake_engine_requests_per_s`` is about."""
BARS = {
    "throughput_ratio": {"at_least": 0.95},
    "added_latency_ms_p50": {"at_most": 5.0},
    "fake_engine_requests_per_s": {"at_least": 500.0},
}


def fake_engine_part(repeats: int, duration_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and raw measurements without a model."""
    raw: dict[str, Any] = {}
    points = []
    for name, (n, num_tokens) in SIZES.items():
        for reward in (None, "exact_match"):
            rounds = measure_requests_per_s(
                n=n, num_tokens=num_tokens, reward=reward, repeats=repeats, duration_s=duration_s
            )
            label = name if reward is None else f"{name}, scored"
            raw[label] = rounds
            rates = [entry["requests_per_s"] for entry in rounds]
            points.append(
                {
                    "group": label,
                    "requests_per_s": round(statistics.median(rates), 1),
                    "spread": [round(min(rates), 1), round(max(rates), 1)],
                    "cpu_ms": _median(rounds, "cpu_ms"),
                    "latency_ms_p50": _median(rounds, "latency_ms_p50"),
                    "latency_ms_p99": _median(rounds, "latency_ms_p99"),
                }
            )
            print(points[-1], file=sys.stderr)
    n, num_tokens = next(iter(SIZES.values()))
    parts = measure_cpu_parts(n=n, num_tokens=num_tokens, reward=None, duration_s=duration_s)
    scored = measure_cpu_parts(
        n=n, num_tokens=num_tokens, reward="exact_match", duration_s=duration_s
    )
    result = {
        "fake_engine_requests_per_s": points[0]["requests_per_s"],
        "fake_engine_points": points,
        "cpu_ms_per_request": parts,
        "cpu_ms_per_scored_request": scored,
    }
    return result, raw


def _median(rounds: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(entry[name] for entry in rounds), 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--duration", type=float, default=4.0, help="seconds of load per repeat")
    parser.add_argument("--only", choices=("engine", "fake"), help="half of it; nothing is kept")
    parser.add_argument("--model", type=Path, default=Path(".cache/models/medium-160m"))
    parser.add_argument("--tokens", type=int, default=64, help="per sample, real engine")
    parser.add_argument("--groups", type=int, default=32, help="per repeat and side, real engine")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "bench": "http",
        "throughput_ratio": None,
        "added_latency_ms_p50": None,
        "fake_engine_requests_per_s": None,
        "cpu_ms_per_request": {},
    }
    raw: dict[str, Any] = {}
    if options.only != "engine":
        figures, raw["fake"] = fake_engine_part(options.repeats, options.duration)
        result |= figures
    if options.only != "fake":
        plan = EnginePlan(
            model=options.model,
            repeats=options.repeats,
            num_groups=options.groups,
            num_tokens=options.tokens,
        )
        figures, raw["engine"] = asyncio.run(compare_with_engine(plan))
        result |= figures
    result["bars"] = judged(result, BARS)
    result["repeats"] = options.repeats
    if options.only is None:
        write_result(result, raw)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
