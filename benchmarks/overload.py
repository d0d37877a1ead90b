"""What does ten times too much load do to the server? It should serve nearly as much as at best.

The whole server over engines that take as long as a formula says. In turn: a closed loop that keeps
the engines full (the peak), and requests at ten times that rate, whoever is refused being gone.
Goodput is groups delivered per second; memory is looked at all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from typing import Any

from benchmarks.harness.bars import judged
from benchmarks.harness.http_load import DROPPED, Load, closed_loop, open_loop, request_bytes
from benchmarks.harness.modelled_engine import EngineTimes
from benchmarks.harness.modelled_server import ModelledServer
from benchmarks.harness.results import print_last_line, write_result

TIMES = EngineTimes(step_s=0.005, step_s_per_sequence=0.00005, max_num_seqs=64, mean_tokens=64.0)
SAMPLES_PER_GROUP = 4
MAX_TOKENS = 256
MAX_PENDING_SAMPLES = 512
SETTINGS: dict[str, Any] = {
    "engine": {"max_num_seqs": TIMES.max_num_seqs},
    "server": {"result_store_mib": 8, "limits": {"max_pending_samples": MAX_PENDING_SAMPLES}},
}
PEAK_CONCURRENCY = MAX_PENDING_SAMPLES // SAMPLES_PER_GROUP * 3 // 4
OVERLOAD_FACTOR = 10
WARM_UP_S = 2.0
DRAIN_S = 3.0
BARS = {"goodput_ratio": {"at_least": 0.9}, "rss_growth_mb": {"at_most": 50.0}}


def request_of(number: int) -> bytes:
    """A group of its own kind, so that lengths differ."""
    body = {
        "prompts": [{"prompt": f"{number % 4093}: what is it?"}],
        "n": SAMPLES_PER_GROUP,
        "sampling": {"max_tokens": MAX_TOKENS},
    }
    return request_bytes("/v1/rollouts", json.dumps(body).encode())


async def peak(server: ModelledServer, duration_s: float) -> Load:
    return await closed_loop(
        server.port,
        [request_of(number) for number in range(4093)],
        concurrency=PEAK_CONCURRENCY,
        duration_s=duration_s,
        count_from_s=WARM_UP_S,
    )


async def overload(
    server: ModelledServer, rate_per_s: float, duration_s: float
) -> tuple[Load, float]:
    """The load, and the most memory that was seen."""
    most_bytes = 0

    def look() -> None:
        nonlocal most_bytes
        most_bytes = max(most_bytes, server.rss_bytes())

    load = await open_loop(
        server.port,
        request_of,
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        count_from_s=WARM_UP_S,
        while_running=look,
    )
    return load, most_bytes / 1e6


def measure(repeats: int, duration_s: float) -> list[dict[str, Any]]:
    rounds = []
    with ModelledServer(settings=SETTINGS, times=TIMES) as server:
        for repeat in range(repeats + 1):
            best = asyncio.run(peak(server, duration_s))
            cpu_s = server.cpu_s()
            load, rss_mb = asyncio.run(
                overload(server, best.ok_per_s * OVERLOAD_FACTOR, duration_s)
            )
            found = {
                "peak_groups_per_s": best.ok_per_s,
                "peak_latency_s_p50": statistics.median(best.latencies_s),
                "offered_per_s": best.ok_per_s * OVERLOAD_FACTOR,
                "goodput_groups_per_s": load.ok_per_s,
                "goodput_ratio": load.ok_per_s / best.ok_per_s,
                "latency_s_p50": statistics.median(load.latencies_s),
                "latency_s_max": max(load.latencies_s),
                "refused": load.statuses[429],
                "refused_with_retry_after": load.num_retry_after,
                "dropped": load.statuses[DROPPED],
                "other_statuses": sum(load.statuses.values())
                - load.statuses[200]
                - load.statuses[429]
                - load.statuses[DROPPED],
                "server_cpu_share": (server.cpu_s() - cpu_s) / duration_s,
                "rss_mb": rss_mb,
            }
            if repeat > 0:  # the first fills what fills once: caches and the store of results
                rounds.append(found)
            print(f"repeat {repeat}/{repeats}: {found}", file=sys.stderr)
    return rounds


def summarize(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return round(statistics.median(r[name] for r in rounds), 3)

    ratios = [r["goodput_ratio"] for r in rounds]
    num_refused = sum(r["refused"] for r in rounds)
    result = {
        "bench": "overload",
        "factor": OVERLOAD_FACTOR,
        "goodput_ratio": median("goodput_ratio"),
        "goodput_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "peak_groups_per_s": median("peak_groups_per_s"),
        "offered_per_s": median("offered_per_s"),
        "peak_latency_s_p50": median("peak_latency_s_p50"),
        "latency_s_p50": median("latency_s_p50"),
        "latency_s_max": max(r["latency_s_max"] for r in rounds),
        "refused": num_refused,
        "refused_without_retry_after": num_refused
        - sum(r["refused_with_retry_after"] for r in rounds),
        "dropped": sum(r["dropped"] for r in rounds),
        "other_statuses": sum(r["other_statuses"] for r in rounds),
        "server_cpu_share": median("server_cpu_share"),
        "rss_growth_mb": round(rounds[-1]["rss_mb"] - rounds[0]["rss_mb"], 2),
        "rss_mb": round(max(r["rss_mb"] for r in rounds), 1),
        "repeats": len(rounds),
    }
    result["bars"] = judged(result, BARS)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--duration", type=float, default=10.0, help="seconds per side and repeat")
    options = parser.parse_args()
    rounds = measure(options.repeats, options.duration)
    result = summarize(rounds)
    write_result(result, rounds)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
