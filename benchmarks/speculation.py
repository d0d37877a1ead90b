"""How much does self-speculation give, and what does being able to cost?

On a model wide enough that a CPU step is bound by memory traffic, at several batch sizes: an engine
started without a drafter, one with a drafter that is switched off (k = 0), and drafts of 2, 3 and 4
tokens. All sides alternate within one run; figures are medians over the repeats, ratios are medians
of per-repeat ratios to the engine without a drafter.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import (
    Measurement,
    ensure_model,
    measure_batch,
    running_engine,
    set_draft_length,
)
from benchmarks.harness.results import print_last_line, write_result
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.types import DrafterScheme, SpeculationMode

UNCONFIGURED = None
"""Side name of the engine that was started without a drafter."""
NUM_PROMPT_TOKENS = 32
MAX_DRAFT_LENGTH = 4
VOCAB_SIZE = 32000

Side = int | None  # draft length, or UNCONFIGURED
Raw = dict[int, list[dict[Side, Measurement]]]  # batch -> repeats -> side


def engine_spec(model: Path, *, scheme: DrafterScheme | None) -> EngineSpec:
    """One of the engines; they differ in nothing but the drafter. None: without one."""
    return EngineSpec(
        engine_id=scheme or "without-drafter",
        index=0,
        model=ModelConfig(path=str(model), dtype="bfloat16", max_model_len=512),
        engine=EngineConfig(
            kv_cache_memory_mib=512,
            max_num_seqs=32,
            block_size=32,
            cpu_cores=[f"0-{(os.cpu_count() or 1) - 1}"],
        ),
        drafter=DrafterConfig(enabled=scheme is not None, scheme=scheme or DrafterScheme.AUTO),
        speculation=SpeculationConfig(
            mode=SpeculationMode.OFF, num_speculative_tokens=MAX_DRAFT_LENGTH
        ),
        device="cpu",
    )


async def measure(
    model: Path, batches: Sequence[int], lengths: Sequence[int], repeats: int, num_tokens: int
) -> Raw:
    """Alternate all sides ``repeats`` times at every batch size, after one uncounted round."""
    sides: list[Side] = [UNCONFIGURED, *lengths]
    raw: Raw = {}
    async with AsyncExitStack() as stack:
        engines: dict[bool, EngineActor] = {}
        for with_drafter in (False, True):
            spec = engine_spec(model, with_drafter=with_drafter)
            engines[with_drafter] = await stack.enter_async_context(running_engine(spec))
        for batch in batches:
            rounds = []
            for repeat in range(repeats + 1):
                # Rotated, so that no side always runs first after a pause.
                order = sides[repeat % len(sides) :] + sides[: repeat % len(sides)]
                measured: dict[Side, Measurement] = {}
                for side in order:
                    engine = engines[side is not UNCONFIGURED]
                    if side is not UNCONFIGURED:
                        await set_draft_length(engine, side)
                    measured[side] = await measure_batch(
                        engine,
                        f"{batch}-{repeat}-{side}",
                        batch,
                        num_prompt_tokens=NUM_PROMPT_TOKENS,
                        num_tokens=num_tokens,
                        vocab_size=VOCAB_SIZE,
                        seed=repeat,
                    )
                if repeat > 0:
                    rounds.append(measured)
                shown = {str(side): round(m.tokens_per_s, 1) for side, m in measured.items()}
                print(f"batch {batch} repeat {repeat}/{repeats}: {shown}", file=sys.stderr)
            raw[batch] = rounds
    return raw


def summarize(raw: Raw) -> dict[str, Any]:
    """Medians; ``k`` null is the engine without a drafter."""
    points = []
    off_ratio = {}
    for batch, rounds in raw.items():
        for side in rounds[0]:
            ratios = [r[side].tokens_per_s / r[UNCONFIGURED].tokens_per_s for r in rounds]
            points.append(
                {
                    "batch": batch,
                    "k": side,
                    "tokens_per_s": round(
                        statistics.median(r[side].tokens_per_s for r in rounds), 2
                    ),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                    "mean_acceptance_length": round(
                        statistics.median(r[side].mean_acceptance_length for r in rounds), 3
                    ),
                }
            )
            if side == 0:
                off_ratio[str(batch)] = points[-1]["ratio"]
    return {"bench": "speculation", "points": points, "off_ratio": off_ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    raw = asyncio.run(
        measure(model, options.batches, options.draft_lengths, options.repeats, options.num_tokens)
    )
    result = summarize(raw)
    write_result(
        result,
        {
            str(batch): [
                {str(side): m.tokens_per_s for side, m in measured.items()} for measured in rounds
            ]
            for batch, rounds in raw.items()
        },
    )
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
