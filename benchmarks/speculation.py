"""How much does self-speculation give, and what does being able to cost?

On a model wide enough that a CPU step is bound by memory traffic, at several batch sizes: an engine
started without a drafter, and one per drafter scheme, switched off (k = 0) and drafting 2, 3 and 4
tokens. All sides alternate within one run; figures are medians over the repeats, ratios are medians
of per-repeat ratios to the engine without a drafter.

The cost of being able to speculate (``off_ratio``) is measured in a phase of its own, with many
short alternations of just two sides, because it is small against the noise of a shared machine.

A sweep per scheme (all draft lengths in turn within one batch, a few steps each, as in calibration)
gives a cost model, and that the time of a draft pass and of a verification pass as ratios to a
plain step: ``c`` and ``v``. With the mean acceptance length L they predict a speedup of
``L / (k c + v)``, which stands beside the measured one.
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
from typing import Any, NamedTuple

import numpy as np

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
from rollout_server.engine.calibration_run import LoadPoint, fit, measure_load
from rollout_server.speculation.calibration import CalibrationPoint
from rollout_server.speculation.cost_model import CostModel
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.types import DrafterScheme, SpeculationMode

NUM_PROMPT_TOKENS = 32
MAX_DRAFT_LENGTH = 4
VOCAB_SIZE = 32000


class Side(NamedTuple):
    """What is measured against what."""

    scheme: DrafterScheme | None
    """None: an engine started without a drafter."""
    k: int


PLAIN = Side(None, 0)
Rounds = list[dict[Side, Measurement]]


def engine_spec(model: Path, *, scheme: DrafterScheme | None) -> EngineSpec:
    """One of the engines; they differ in nothing but the drafter."""
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


async def alternate(
    engines: dict[DrafterScheme | None, EngineActor],
    sides: Sequence[Side],
    batch: int,
    repeats: int,
    num_tokens: int,
    phase: str,
) -> Rounds:
    """Measure all sides ``repeats`` times in turn, after one uncounted round."""
    rounds: Rounds = []
    for repeat in range(repeats + 1):
        # Rotated, so that no side always runs first after a pause.
        shift = repeat % len(sides)
        measured: dict[Side, Measurement] = {}
        for side in [*sides[shift:], *sides[:shift]]:
            engine = engines[side.scheme]
            if side.scheme is not None:
                await set_draft_length(engine, side.k)
            measured[side] = await measure_batch(
                engine,
                f"{phase}-{batch}-{repeat}-{side.scheme}-{side.k}",
                batch,
                num_prompt_tokens=NUM_PROMPT_TOKENS,
                num_tokens=num_tokens,
                vocab_size=VOCAB_SIZE,
                seed=repeat,
            )
        if repeat > 0:
            rounds.append(measured)
        shown = {
            f"{s.scheme or 'plain'}/{s.k}": round(m.tokens_per_s, 1) for s, m in measured.items()
        }
        print(f"{phase}, batch {batch}, {repeat}/{repeats}: {shown}", file=sys.stderr)
    return rounds


def ratios(rounds: Rounds, side: Side) -> list[float]:
    """Throughput against the engine without a drafter, per repeat."""
    return [r[side].tokens_per_s / r[PLAIN].tokens_per_s for r in rounds]


async def fit_costs(engine: EngineActor, batches: Sequence[int], num_tokens: int) -> CostModel:
    """The cost model of one engine."""
    points: list[CalibrationPoint] = []
    lengths = range(MAX_DRAFT_LENGTH + 1)
    for batch in batches:
        load = LoadPoint(
            num_reqs=batch,
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            num_tokens=num_tokens,
            vocab_size=VOCAB_SIZE,
        )
        points += await measure_load(engine, load, lengths, steps_each=4, seed=batch)
    model, quality = fit(points)
    print(f"costs fitted to {quality}", file=sys.stderr)
    return model


def summarize(
    raw: dict[int, Rounds],
    off: dict[int, Rounds],
    costs: dict[DrafterScheme, CostModel],
    *,
    scheme: DrafterScheme,
    num_tokens: int,
) -> dict[str, Any]:
    """Medians and spreads; ``scheme`` null is the engine without a drafter."""
    points: list[dict[str, Any]] = []
    for batch, rounds in raw.items():
        for side in rounds[0]:
            values = ratios(rounds, side)
            length = statistics.median(r[side].mean_acceptance_length for r in rounds)
            point: dict[str, Any] = {
                "scheme": None if side.scheme is None else side.scheme.value,
                "batch": batch,
                "k": side.k,
                "tokens_per_s": round(statistics.median(r[side].tokens_per_s for r in rounds), 2),
                "ratio": round(statistics.median(values), 3),
                "ratio_min": round(min(values), 3),
                "ratio_max": round(max(values), 3),
                "mean_acceptance_length": round(length, 3),
            }
            if side.scheme is not None and side.k:
                num_kv_tokens = batch * (NUM_PROMPT_TOKENS + num_tokens // 2)
                c, v = costs[side.scheme].ratios(batch, num_kv_tokens, side.k)
                per_position = zip(*(r[side].acceptance_per_position for r in rounds), strict=False)
                point |= {
                    "acceptance_per_position": [
                        round(statistics.median(shares), 3) for shares in per_position
                    ],
                    "c": round(c, 3),
                    "v": round(v, 3),
                    "predicted_ratio": round(length / (side.k * c + v), 3),
                }
            points.append(point)
    off_side = Side(scheme, 0)
    off_ratios = {batch: ratios(rounds, off_side) for batch, rounds in off.items()}
    return {
        "bench": "speculation",
        "points": points,
        "off_ratio": {
            str(b): round(statistics.median(values), 3) for b, values in off_ratios.items()
        },
        "off_ratio_quartiles": {
            str(batch): [round(float(q), 3) for q in np.quantile(values, [0.25, 0.75])]
            for batch, values in off_ratios.items()
        },
        "off_scheme": scheme.value,
    }


async def measure(options: argparse.Namespace, model: Path) -> tuple[dict[str, Any], Any]:
    """The result and its raw figures."""
    schemes = [DrafterScheme(scheme) for scheme in options.schemes]
    sides = [PLAIN, *(Side(scheme, k) for scheme in schemes for k in options.draft_lengths)]
    raw: dict[int, Rounds] = {}
    off: dict[int, Rounds] = {}
    async with AsyncExitStack() as stack:
        engines: dict[DrafterScheme | None, EngineActor] = {}
        for scheme in (None, *schemes):
            spec = engine_spec(model, scheme=scheme)
            engines[scheme] = await stack.enter_async_context(running_engine(spec))
        for batch in options.batches:
            raw[batch] = await alternate(
                engines, sides, batch, options.repeats, options.num_tokens, "speculation"
            )
        for batch in options.off_batches:
            off[batch] = await alternate(
                engines,
                [PLAIN, Side(schemes[0], 0)],
                batch,
                options.off_repeats,
                options.num_tokens // 2,
                "off",
            )
        costs = {
            scheme: await fit_costs(engines[scheme], options.batches, 2 * options.num_tokens)
            for scheme in schemes
        }
    figures = {
        phase: {
            str(batch): [
                {f"{s.scheme or 'plain'}/{s.k}": m.tokens_per_s for s, m in measured.items()}
                for measured in rounds
            ]
            for batch, rounds in phases.items()
        }
        for phase, phases in (("speculation", raw), ("off", off))
    }
    result = summarize(raw, off, costs, scheme=schemes[0], num_tokens=options.num_tokens)
    return result, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--off-batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--schemes", nargs="+", default=["int4", "int8"])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--off-repeats", type=int, default=15)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    model = ensure_model(options.model, "wide-450m")
    result, raw = asyncio.run(measure(options, model))
    write_result(result, raw)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
