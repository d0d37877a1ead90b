"""Do more engines make more tokens, may they come and go, and what does the router cost?

With real engines of one core each (``medium-160m``), the real server, Ray and HTTP, on two cores:
two engines against one, alternating, with as many clients per engine on both sides; then 1, 2, 4
and 1 engines in turn by ``PUT /v1/engines`` while clients go on, every answer looked into. Then two
engines of vLLM alone against one. With 64 engines in memory: how long a group is with the router
while 2,000 are in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.bars import judged
from benchmarks.harness.checked_load import GroupShape, checked_loop, group_request
from benchmarks.harness.engines import ensure_model
from benchmarks.harness.plain_engines import measure_plain
from benchmarks.harness.real_server import RealServer
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.router_load import RouterPlan, measure_router, router_figures
from benchmarks.harness.scale_steps import (
    ElasticPlan,
    EngineControl,
    elastic_figures,
    run_elastic,
    timeline,
)
from trainer.demo_model.presets import preset_of

PRESET = "medium-160m"
CLIENTS_PER_ENGINE = 2
COUNTS = (1, 2, 4, 1)
WARM_UP_TOKENS = 8
TIMELINE_INTERVAL_S = 5.0
ROUTER = RouterPlan(num_engines=64, num_in_flight=2000, n=4, warm_up_s=6.0, duration_s=10.0)
BARS: dict[str, dict[str, float]] = {
    "two_engine_ratio": {"at_least": 1.8},
    "failed_requests": {"at_most": 0},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputPlan:
    """One side is one engine, the other two."""

    shape: GroupShape
    groups_per_client: int
    vocab_size: int


def server_settings(model: Path, shape: GroupShape, cores: Sequence[int]) -> dict[str, Any]:
    """Engines of one core, no drafter: they generate, and little else."""
    return {
        "model": {"path": str(model), "dtype": "bfloat16", "max_model_len": 1024},
        "engine": {
            "count": 1,
            "max_count": max(COUNTS),
            "cpu_cores": [str(core) for core in cores],
            "kv_cache_memory_mib": 256,
            "max_num_seqs": CLIENTS_PER_ENGINE * shape.n,
            "enable_prefix_caching": False,
            "start_timeout_s": 600.0,
        },
        "drafter": {"enabled": False},
        "speculation": {"mode": "off"},
    }


async def throughput(port: int, num_engines: int, plan: ThroughputPlan, first: int) -> float:
    """Tokens per second of so many engines, each with its share of the clients.

    All groups are of one size and every client has as many, so that none is alone at the end.

    Raises:
        RuntimeError: an answer was not whole, or an engine had nothing to do.
    """
    concurrency = CLIENTS_PER_ENGINE * num_engines
    brief = GroupShape(n=plan.shape.n, num_tokens=WARM_UP_TOKENS)
    warm_up = iter([group_request(first + i, brief, plan.vocab_size) for i in range(concurrency)])
    await checked_loop(port, warm_up, brief, concurrency=concurrency)
    requests = [
        group_request(first + i, plan.shape, plan.vocab_size)
        for i in range(concurrency * plan.groups_per_client)
    ]
    outcomes = await checked_loop(port, iter(requests), plan.shape, concurrency=concurrency)
    faults = [outcome.fault for outcome in outcomes if outcome.fault is not None]
    engine_ids = {engine_id for outcome in outcomes for engine_id in outcome.engine_ids}
    if faults or len(engine_ids) != num_engines:
        raise RuntimeError(f"{len(engine_ids)} of {num_engines} engines answered; {faults}")
    elapsed_s = max(outcome.ended_s for outcome in outcomes)
    return len(outcomes) * plan.shape.num_group_tokens / elapsed_s


async def measure_throughput(
    port: int, plan: ThroughputPlan, repeats: int, *, confined: bool
) -> list[dict[str, float]]:
    """Tokens per second of both sides, in turn, after one uncounted repeat.

    Args:
        confined: nothing of an engine runs outside its core, on either side.
    """
    control = EngineControl(port)
    numbers = itertools.count(step=10_000)
    rounds = []
    for repeat in range(repeats + 1):
        found = {}
        # The side that came last comes first: each engine is started once per two repeats.
        for num_engines in (1, 2) if repeat % 2 == 0 else (2, 1):
            await control.scale(num_engines)
            if confined:
                await control.confine()
            rate = await throughput(port, num_engines, plan, next(numbers))
            found[f"{num_engines}_tokens_per_s"] = rate
        found["ratio"] = found["2_tokens_per_s"] / found["1_tokens_per_s"]
        if repeat > 0:
            rounds.append(found)
        print(f"repeat {repeat}/{repeats}: {found}", file=sys.stderr)
    return rounds


def throughput_figures(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Ratios within a repeat, then their median."""
    ratios = [one["ratio"] for one in rounds]
    return {
        "two_engine_ratio": round(statistics.median(ratios), 3),
        "two_engine_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        **{
            f"{name}_engine_tokens_per_s": round(
                statistics.median(one[f"{count}_tokens_per_s"] for one in rounds), 1
            )
            for name, count in (("one", 1), ("two", 2))
        },
    }


def plain_figures(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What two engines of vLLM without a service make of one."""
    ratios = [one["ratio"] for one in rounds]
    return {
        "plain_vllm_ratio": round(statistics.median(ratios), 3),
        "plain_vllm_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }


async def measure_engines(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both questions to real engines, on one server; figures and what is behind them."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two engines of one core each need two cores")
    model = ensure_model(options.model, PRESET)
    vocab_size = preset_of(PRESET).vocab_size
    shape = GroupShape(n=options.n, num_tokens=options.tokens)
    with RealServer(server_settings(model, shape, cores)) as server:
        plan = ThroughputPlan(
            shape=shape, groups_per_client=options.groups_per_client, vocab_size=vocab_size
        )
        rounds = await measure_throughput(
            server.port, plan, options.repeats, confined=options.confine
        )
        await EngineControl(server.port).scale(COUNTS[0])
        elastic = await run_elastic(
            server.port,
            ElasticPlan(
                counts=COUNTS,
                hold_s=options.hold,
                # As many as the most engines can run, so that each new one finds work.
                concurrency=CLIENTS_PER_ENGINE * max(COUNTS),
                shape=shape,
                vocab_size=vocab_size,
            ),
        )
    figures = elastic_figures(elastic, shape)
    plain = measure_plain(
        model, cores, CLIENTS_PER_ENGINE * options.n, options.tokens, options.repeats
    )
    result = {
        **throughput_figures(rounds),
        **plain_figures(plain),
        "engines_confined": options.confine,
        "failed_requests": figures.pop("failed_requests"),
        "elastic": figures,
    }
    raw = {
        "throughput": rounds,
        "plain": plain,
        "timeline": timeline(elastic, TIMELINE_INTERVAL_S),
        "requests": [asdict(outcome) for outcome in elastic.outcomes],
    }
    return result, raw


def measure_routers(repeats: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Each repeat has an event loop and engines of its own."""
    rounds = []
    for repeat in range(repeats + 1):
        found = asyncio.run(measure_router(ROUTER, seed=repeat))
        if repeat > 0:
            rounds.append(found)
        print(f"router {repeat}/{repeats}: {found}", file=sys.stderr)
    return router_figures(rounds), rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("engines", "router"), help="a part; nothing is kept")
    parser.add_argument("--model", type=Path, default=Path(".cache/models/medium-160m"))
    parser.add_argument("--n", type=int, default=4, help="samples of a group, real engines")
    parser.add_argument("--tokens", type=int, default=64, help="per sample, real engines")
    parser.add_argument("--groups-per-client", type=int, default=6, help="per repeat and side")
    parser.add_argument("--hold", type=float, default=20.0, help="seconds with a count of engines")
    parser.add_argument(
        "--confine",
        action="store_true",
        help="keep all processes of an engine on its core, not only those that compute",
    )
    options = parser.parse_args()
    result: dict[str, Any] = {
        "bench": "scale",
        "two_engine_ratio": None,
        "failed_requests": None,
        "router_ms_p50": None,
    }
    raw: dict[str, Any] = {}
    if options.only != "engines":
        figures, raw["router"] = measure_routers(options.repeats)
        result |= figures
    if options.only != "router":
        figures, raw["engines"] = asyncio.run(measure_engines(options))
        result |= figures
    result["bars"] = judged(result, BARS)
    result["repeats"] = options.repeats
    if options.only is None:
        write_result(result, raw)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
