"""Draws one mixed run: running sequences, draft length and throughput over time, adaptive and off.

A few batches of the mixed load of ``benchmarks.scheduler`` (16 sequences that drain), once with
``adaptive`` and once without drafts on the same lengths. Writes ``docs/images/mixed.png``, and the
recorded decisions beside the other results.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import ensure_model, running_engine
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.scheduler import (
    ADAPTIVE,
    MIXED_PLACES,
    MIXED_SIDES,
    engine_spec,
    generate_all,
    long_tailed_lengths,
)
from shared.schemas.speculation import SpeculationStep

SIDES = ("off", ADAPTIVE)
MEAN_TOKENS = 24


async def record(model: Path, num_batches: int) -> dict[str, list[SpeculationStep]]:
    """Recorded decisions of each side, after a batch that is not counted."""
    lengths = long_tailed_lengths(num_batches * MIXED_PLACES, MEAN_TOKENS, 12 * MEAN_TOKENS, seed=0)
    history: dict[str, list[SpeculationStep]] = {}
    spec = engine_spec(model, num_places=MIXED_PLACES, kv_cache_mib=128)
    async with running_engine(spec) as engine:
        await generate_all(engine, "warm-up", lengths[:MIXED_PLACES], 32, seed=99)
        for side in SIDES:
            await engine.set_speculation(MIXED_SIDES[side])
            before = await engine.speculation(2**62)
            for first in range(0, len(lengths), MIXED_PLACES):
                batch = lengths[first : first + MIXED_PLACES]
                await generate_all(engine, f"{side}-{first}", batch, 32, seed=first)
            history[side] = (await engine.speculation(before.num_steps)).history
    return history


def draw(history: dict[str, list[SpeculationStep]], path: Path) -> None:
    """Three panels over seconds since the start of each side."""
    from trainer.report.style import BLUE, MUTED, new_figure, plot_style, save

    with plot_style():
        figure, [reqs, length, tokens] = new_figure(3, 1.9)
        for side, colour in zip(SIDES, (MUTED, BLUE), strict=True):
            steps = history[side]
            times = [step.time_s - steps[0].time_s for step in steps]
            reqs.step(
                times, [s.num_running_reqs for s in steps], where="post", color=colour, lw=1.2
            )
            made = [s.num_generated_tokens - steps[0].num_generated_tokens for s in steps]
            tokens.plot(times, made, color=colour, lw=1.6, label=side)
            if side == ADAPTIVE:
                drafts = [s.num_speculative_tokens for s in steps]
                length.step(times, drafts, where="post", color=colour, lw=1.2)
        reqs.set_title("Batches of 16 that drain: plain decoding and the adaptive scheduler")
        reqs.set_ylabel("running")
        length.set_ylabel("draft length K")
        tokens.set_ylabel("tokens made")
        tokens.set_xlabel("seconds")
        tokens.legend(loc="upper left")
        save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/images/mixed.png"))
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    history = asyncio.run(record(model, options.batches))
    draw(history, options.output)
    seconds = {s: round(steps[-1].time_s - steps[0].time_s, 2) for s, steps in history.items()}
    result: dict[str, Any] = {"bench": "scheduler_plot", "seconds": seconds}
    write_result(result, {s: [x.model_dump(mode="json") for x in h] for s, h in history.items()})
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
