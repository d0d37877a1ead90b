"""Where does the time of a draft-verify cycle go?

One engine per scheme on the wide model; at every batch size, the time per engine step of each part:
the drafter's passes (forward, LM head, sampling, metadata), the target's pass, verification and
bookkeeping in the worker, and the rest of the step outside of it (scheduler, messages between
processes). K = 0 is a plain step. Figures are medians over repeats, in milliseconds per step.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.cycle_profile import PROFILING_EXTENSION
from benchmarks.harness.engines import (
    ensure_model,
    measure_batch,
    running_engine,
    set_draft_length,
)
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.speculation_sides import NUM_PROMPT_TOKENS, VOCAB_SIZE, engine_spec
from rollout_server.engine import arguments
from rollout_server.engine.actor import EngineActor
from shared.types import DrafterScheme

OUTSIDE = "scheduler and messages"
REST = "rest of the worker's step"


async def profile_once(
    engine: EngineActor, name: str, batch: int, length: int, num_tokens: int, seed: int
) -> dict[str, float]:
    """Milliseconds per engine step of every part; ``cycle`` is all of it."""
    await set_draft_length(engine, length)
    llm = engine._llm
    before = await engine.speculation(2**62)
    await llm.collective_rpc("profile_start")
    started = time.perf_counter()
    await measure_batch(
        engine,
        name,
        batch,
        num_prompt_tokens=NUM_PROMPT_TOKENS,
        num_tokens=num_tokens,
        vocab_size=VOCAB_SIZE,
        seed=seed,
    )
    elapsed_s = time.perf_counter() - started
    (parts,) = await llm.collective_rpc("profile_stop")
    after = await engine.speculation(2**62)
    steps = after.num_steps - before.num_steps
    per_step = {part: 1000 * seconds / steps for part, (seconds, _) in parts.items()}
    in_worker = per_step.pop("step")
    per_step[REST] = in_worker - sum(per_step.values())
    per_step[OUTSIDE] = 1000 * elapsed_s / steps - in_worker
    per_step["cycle"] = 1000 * elapsed_s / steps
    return per_step


async def measure(
    model: Path,
    schemes: Sequence[DrafterScheme],
    batches: Sequence[int],
    lengths: Sequence[int],
    repeats: int,
    num_tokens: int,
) -> list[dict[str, Any]]:
    """One point per scheme, batch and draft length, with raw repeats."""
    points = []
    for scheme in schemes:
        async with running_engine(engine_spec(model, scheme=scheme)) as engine:
            for batch in batches:
                runs: dict[int, list[dict[str, float]]] = {length: [] for length in lengths}
                for repeat in range(repeats + 1):
                    for length in lengths:
                        name = f"{scheme}-{batch}-{length}-{repeat}"
                        parts = await profile_once(engine, name, batch, length, num_tokens, repeat)
                        if repeat > 0:  # the first one warms up
                            runs[length].append(parts)
                for length, raw in runs.items():
                    names = sorted({name for run in raw for name in run} - {"cycle"})
                    median = {
                        name: round(statistics.median(run.get(name, 0.0) for run in raw), 3)
                        for name in [*names, "cycle"]
                    }
                    cycle_ms = median.pop("cycle")
                    points.append(
                        {
                            "scheme": scheme.value,
                            "batch": batch,
                            "k": length,
                            "cycle_ms": cycle_ms,
                            "parts_ms": median,
                        }
                    )
                    print_parts(points[-1])
    return points


def print_parts(point: dict[str, Any]) -> None:
    """A line per part, largest first."""
    head = f"{point['scheme']}, batch {point['batch']}, K = {point['k']}"
    print(f"{head}: {point['cycle_ms']:.2f} ms a step", file=sys.stderr)
    for part, milliseconds in sorted(point["parts_ms"].items(), key=lambda item: -item[1]):
        print(f"  {milliseconds:8.3f} ms  {part}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", type=DrafterScheme, nargs="+", default=["int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    arguments.WORKER_EXTENSION_CLASS = PROFILING_EXTENSION
    points = asyncio.run(
        measure(
            model,
            [DrafterScheme(scheme) for scheme in options.schemes],
            options.batches,
            options.draft_lengths,
            options.repeats,
            options.num_tokens,
        )
    )
    result = {"bench": "drafter", "points": points}
    write_result(result, None)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
