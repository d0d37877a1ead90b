"""Does the adaptive scheduler find the best draft length at every load, and on a load that changes?

On a real engine with the wide model (a CPU step bound by memory traffic at one sequence and by
arithmetic at sixteen, so that the best draft length goes from the longest to none):

- *points*: at each load (sequences, context) every fixed draft length and ``adaptive`` take turns
  within a running batch. The figure is ``adaptive`` over the best fixed length, 0 included, round
  by round.
- *mixed*: 128 prompts with long-tailed lengths in eight batches of 16, each of which is waited for,
  as a synchronous training loop does: the batch drains from 16 to 1 again and again. Off, always
  on, behind the KV gate alone, and ``adaptive``.
- *streaming*: the same prompts all at once: 16 run, the others queue, and there is one tail.

All also say how good the predictions were: whether the cost model's choice to speculate or not was
the measured one, and the median error of its step times. Needs a calibration of this very machine
(``make calibrate``); without one the engine measures itself when it starts, and the result says so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import ensure_model, running_engine
from benchmarks.harness.results import (
    circumstances,
    print_last_line,
    read_result,
    write_result,
)
from benchmarks.harness.scheduler_points import Load, measure_point, summarize_point
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.protocol import GenerateRequest
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationMode

MAX_DRAFT_LENGTH = 4
VOCAB_SIZE = 32000
NUM_PLACES = 24
MIXED_PLACES = 16
PARTS = ["points", "mixed", "streaming"]


LOADS = (
    Load(1, 32),
    Load(2, 32),
    Load(4, 32),
    Load(6, 32),
    Load(8, 32),
    Load(12, 32),
    Load(16, 32),
    Load(24, 32),
    Load(1, 512),
    Load(4, 512),
)
ADAPTIVE = "adaptive"
KV_GATE_THRESHOLD = 0.15
"""Of the mixed load's pool: about eight sequences of middling length, where the points cross."""
OPEN_THRESHOLD = 0.95


def side_patch(mode: SpeculationMode, length: int = MAX_DRAFT_LENGTH) -> SpeculationPatch:
    """A whole setting: no side may inherit from the one before it."""
    is_gate = mode is SpeculationMode.KV_GATE
    return SpeculationPatch(
        mode=mode,
        num_speculative_tokens=length,
        kv_cache_threshold=KV_GATE_THRESHOLD if is_gate else OPEN_THRESHOLD,
    )


MIXED_SIDES = {
    "off": side_patch(SpeculationMode.OFF),
    "always_2": side_patch(SpeculationMode.ALWAYS, 2),
    "always": side_patch(SpeculationMode.ALWAYS),
    "kv_gate": side_patch(SpeculationMode.KV_GATE),
    ADAPTIVE: side_patch(SpeculationMode.ADAPTIVE),
}
POINT_SIDES = {
    "0": MIXED_SIDES["off"],
    **{str(k): side_patch(SpeculationMode.ALWAYS, k) for k in range(1, MAX_DRAFT_LENGTH + 1)},
    ADAPTIVE: MIXED_SIDES[ADAPTIVE],
}


def engine_spec(model: Path, *, num_places: int, kv_cache_mib: int) -> EngineSpec:
    """The engine under test."""
    return EngineSpec(
        engine_id=f"scheduler-{num_places}",
        index=0,
        model=ModelConfig(path=str(model), dtype="bfloat16", max_model_len=1024),
        engine=EngineConfig(
            kv_cache_memory_mib=kv_cache_mib,
            max_num_seqs=num_places,
            block_size=32,
            cpu_cores=[f"0-{(os.cpu_count() or 1) - 1}"],
        ),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(num_speculative_tokens=MAX_DRAFT_LENGTH),
        device="cpu",
    )


async def generate_all(
    engine: EngineActor, name: str, lengths: Sequence[int], num_prompt_tokens: int, seed: int
) -> float:
    """Sequences of exactly these lengths, all asked for at once; seconds until the last is done.

    Prompts are distinct within a batch and the same for every side, so that after the first round
    they come from the prefix cache and only decoding is timed.
    """
    generator = random.Random(seed)
    requests = [
        GenerateRequest(
            request_id=f"{name}-{index}",
            prompt_token_ids=[generator.randrange(VOCAB_SIZE) for _ in range(num_prompt_tokens)],
            n=1,
            sampling=SamplingOptions(temperature=1.0, max_tokens=length, ignore_eos=True),
        )
        for index, length in enumerate(lengths)
    ]
    started = time.perf_counter()
    await asyncio.gather(*(engine.generate(request) for request in requests))
    return time.perf_counter() - started


def long_tailed_lengths(num_prompts: int, mean: int, longest: int, seed: int) -> list[int]:
    """Lognormal, as response lengths in RL are: most short, a few many times the mean."""
    generator = random.Random(seed)
    sigma = 1.0
    draws = [generator.lognormvariate(0.0, sigma) for _ in range(num_prompts)]
    scale = mean / statistics.mean(draws)
    return [min(max(round(draw * scale), 4), longest) for draw in draws]


async def measure_mixed(
    engine: EngineActor, options: argparse.Namespace, at_once: int
) -> dict[str, Any]:
    """All sides in turn on the same lengths.

    Args:
        at_once: prompts asked for together and waited for; those without a place queue.
    """
    repeats, num_prompts = options.mixed_repeats, options.num_prompts
    lengths = long_tailed_lengths(
        num_prompts, options.mean_tokens, 12 * options.mean_tokens, seed=0
    )
    rounds: list[dict[str, float]] = []
    names = list(MIXED_SIDES)
    for repeat in range(repeats):
        random.Random(repeat).shuffle(names)
        seconds: dict[str, float] = {}
        for side in names:
            await engine.set_speculation(MIXED_SIDES[side])
            seconds[side] = 0.0
            for first in range(0, num_prompts, at_once):
                seconds[side] += await generate_all(
                    engine,
                    f"mixed-{at_once}-{repeat}-{side}-{first}",
                    lengths[first : first + at_once],
                    32,
                    seed=first,
                )
        rounds.append(seconds)
        shown = {side: round(s, 1) for side, s in seconds.items()}
        print(f"mixed by {at_once}, {repeat + 1}/{repeats}, seconds: {shown}", file=sys.stderr)
    ratios = {side: [r["off"] / r[side] for r in rounds] for side in names}
    beats = {
        side: round(statistics.median(r[side] / r[ADAPTIVE] for r in rounds), 3)
        for side in names
        if side != ADAPTIVE
    }
    return {
        **{side: round(statistics.median(values), 3) for side, values in ratios.items()},
        "adaptive_over": beats,
        "spread": {s: [round(min(v), 3), round(max(v), 3)] for s, v in ratios.items()},
        "num_prompts": num_prompts,
        "num_tokens": sum(lengths),
        "longest": max(lengths),
        "seconds": [{side: round(s, 2) for side, s in r.items()} for r in rounds],
    }


def with_new_points(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A load that was measured again replaces its point; the others are kept."""
    by_load = {point["load"]: point for point in (*old, *new)}
    return [by_load[load.name] for load in LOADS if load.name in by_load]


async def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The parts asked for; the others are kept from earlier runs (``commits``, ``cpus``)."""
    result: dict[str, Any] = {"bench": "scheduler", "points": [], "mixed": {}, "commits": {}}
    result |= read_result("scheduler") or {}
    for part in options.parts:
        now = circumstances()
        result["commits"][part] = now["commit"]
        result.setdefault("cpus", {})[part] = now["cpu"]
    if "points" in options.parts:
        new_points = []
        spec = engine_spec(model, num_places=NUM_PLACES, kv_cache_mib=1536)
        async with running_engine(spec) as engine:
            for load in (load for load in LOADS if load.name in options.loads):
                rounds = await measure_point(
                    engine,
                    load,
                    POINT_SIDES,
                    rounds=options.repeats,
                    slice_s=options.slice_s,
                    vocab_size=VOCAB_SIZE,
                )
                new_points.append(
                    summarize_point(load, rounds, ADAPTIVE) | {"commit": circumstances()["commit"]}
                )
                print(new_points[-1], file=sys.stderr)
            report = await engine.speculation(2**62)
        result["points"] = with_new_points(result["points"], new_points)
        if len(new_points) == len(LOADS):
            result["prediction"] = {
                "cost_model": report.cost_model,
                "median_step_time_error": round(report.median_step_time_error or 0.0, 4),
                "num_predicted_steps": report.num_predicted_steps,
            }
        signs = [point["sign_right"] for point in result["points"]]
        result["prediction"]["sign_right_share"] = round(sum(signs) / len(signs), 3)
    mixed_parts = [part for part in ("mixed", "streaming") if part in options.parts]
    if mixed_parts:
        spec = engine_spec(model, num_places=MIXED_PLACES, kv_cache_mib=128)
        async with running_engine(spec) as engine:
            for part in mixed_parts:
                at_once = MIXED_PLACES if part == "mixed" else options.num_prompts
                measured = await measure_mixed(engine, options, at_once)
                report = await engine.speculation(0)
                measured["cost_model"] = report.cost_model
                error = report.median_step_time_error or 0.0
                measured["median_step_time_error"] = round(error, 4)
                result[part] = measured
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    names = [load.name for load in LOADS]
    parser.add_argument(
        "--loads",
        nargs="+",
        choices=names,
        default=names,
        help="Points of other loads are kept, and the step-time error of the last whole run.",
    )
    parser.add_argument("--repeats", type=int, default=11, help="Rounds at each load.")
    parser.add_argument("--slice-s", type=float, default=1.0, help="One side's turn.")
    parser.add_argument("--mixed-repeats", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--mean-tokens", type=int, default=24)
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    result = asyncio.run(measure(options, model))
    write_result(result, None)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
