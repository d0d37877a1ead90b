"""How much does self-speculation give, and what does being able to cost?

On a model wide enough that a CPU step is bound by memory traffic, at several batch sizes: an engine
started without a drafter, and one per drafter scheme, switched off (k = 0) and drafting 2, 3 and 4
tokens. All sides alternate within one run; figures are medians over the repeats, ratios are medians
of per-repeat ratios to the engine without a drafter.

The cost of being able to speculate (``off_ratio``) is measured in a part of its own, over several
sets of fresh engines (``harness/off_cost.py``), because it is small against the noise.

A sweep per scheme (all draft lengths in turn within one batch, a few steps each, as in calibration)
gives a cost model, and that the time of a draft pass and of a verification pass as ratios to a
plain step: ``c`` and ``v``. With the mean acceptance length L they predict a speedup of
``L / (k c + v)``, which stands beside the measured one.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import ensure_model, running_engine
from benchmarks.harness.off_cost import measure_set, summarize_off
from benchmarks.harness.results import circumstances, print_last_line, read_document, write_result
from benchmarks.harness.speculation_sides import (
    MAX_DRAFT_LENGTH,
    NUM_PROMPT_TOKENS,
    PLAIN,
    VOCAB_SIZE,
    Rounds,
    Side,
    alternate,
    engine_spec,
    ratios,
)
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.calibration_run import LoadPoint, fit, measure_load
from rollout_server.speculation.calibration import CalibrationPoint
from rollout_server.speculation.cost_model import CostModel
from shared.types import DrafterScheme

PARTS = ["points", "off"]


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


def summarize_points(
    raw: dict[int, Rounds], costs: dict[DrafterScheme, CostModel], *, num_tokens: int
) -> list[dict[str, Any]]:
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
    return points


async def measure_points(
    options: argparse.Namespace, model: Path
) -> tuple[list[dict[str, Any]], Any]:
    """All sides in turn; the points and the raw figures."""
    schemes = [DrafterScheme(scheme) for scheme in options.schemes]
    sides = [PLAIN, *(Side(scheme, k) for scheme in schemes for k in options.draft_lengths)]
    raw: dict[int, Rounds] = {}
    async with AsyncExitStack() as stack:
        engines: dict[DrafterScheme | None, EngineActor] = {}
        for scheme in (None, *schemes):
            spec = engine_spec(model, scheme=scheme)
            engines[scheme] = await stack.enter_async_context(running_engine(spec))
        for batch in options.batches:
            raw[batch] = await alternate(engines, sides, batch, options.repeats, options.num_tokens)
        costs = {
            scheme: await fit_costs(engines[scheme], options.batches, 2 * options.num_tokens)
            for scheme in schemes
        }
    figures = {
        str(batch): [
            {f"{s.scheme or 'plain'}/{s.k}": m.tokens_per_s for s, m in measured.items()}
            for measured in rounds
        ]
        for batch, rounds in raw.items()
    }
    return summarize_points(raw, costs, num_tokens=options.num_tokens), figures


async def measure(options: argparse.Namespace, model: Path) -> tuple[dict[str, Any], Any]:
    """The parts asked for, with raw figures; the other is kept from an earlier run."""
    document = read_document("speculation") or {"result": {}, "raw": {}}
    result: dict[str, Any] = {"bench": "speculation", **document["result"]}
    raw = document["raw"]
    if "points" in options.parts:
        result["points"], raw["speculation"] = await measure_points(options, model)
    if "off" in options.parts:
        scheme = DrafterScheme(options.schemes[0])
        sets = [
            await measure_set(
                model,
                scheme,
                number,
                options.off_batches,
                repeats=options.off_repeats,
                num_tokens=options.num_tokens // 2,
            )
            for number in range(options.off_sets)
        ]
        result |= summarize_off(sets, scheme)
        raw["off"] = [{str(batch): rounds for batch, rounds in one.items()} for one in sets]
    for part in options.parts:
        result.setdefault("commits", {})[part] = circumstances()["commit"]
    return result, raw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--off-batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--schemes", nargs="+", default=["int4", "int8"])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--off-sets", type=int, default=5, help="Sets of fresh engines.")
    parser.add_argument("--off-repeats", type=int, default=7, help="Rounds of each set.")
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
