"""Measures an engine's step times and fits a cost model: quickly at start, or thoroughly.

Whole cycles under real conditions: prompts are random and distinct (no KV block is shared), tokens
are sampled at temperature 1, and a step's seconds include scheduling and bookkeeping.
"""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.protocol import GenerateRequest, GenerateResult
from rollout_server.speculation.calibration import CalibrationPoint
from rollout_server.speculation.calibration_fit import FitQuality, MeasuredStep, fit_cost_model
from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.steps import StepShape
from shared.schemas.rollouts import SamplingOptions

LOGGER = logging.getLogger(__name__)

ALL_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LONG_BATCHES = (1, 4, 8, 32, 128)
SHORT_PROMPT, LONG_PROMPT = 32, 512
MIN_STEPS = 3
"""Fewer steady steps of one kind than this are not a measurement."""


class MeasurableEngine(Protocol):
    """What measuring needs of an engine."""

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    async def begin_sweep(self, draft_lengths: Sequence[int], steps_each: int) -> None: ...

    async def end_sweep(self) -> list[tuple[StepShape, float]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPoint:
    """A batch to measure all draft lengths on."""

    num_reqs: int
    num_prompt_tokens: int
    num_tokens: int
    """Tokens each sequence generates while draft lengths take turns."""
    vocab_size: int
    """Prompts are made of token ids below it."""


async def calibrate_itself(
    engine: MeasurableEngine,
    spec: EngineSpec,
    *,
    vocab_size: int,
    max_model_len: int,
    budget_s: float,
) -> CostModel | None:
    """A rough model within about ``budget_s``; None if not enough was measured.

    One short batch each of 1, 4 and 16 sequences, smallest first: where time runs out, the large
    batches, which speculate least, are what goes unmeasured.
    """
    deadline_s = time.monotonic() + budget_s
    lengths = sorted({0, 1, spec.speculation.num_speculative_tokens})
    points: list[CalibrationPoint] = []
    for num_reqs in (1, 4, 16):
        if num_reqs > spec.engine.max_num_seqs:
            break
        load = LoadPoint(
            num_reqs=num_reqs,
            num_prompt_tokens=min(16, max_model_len // 4),
            num_tokens=min(12 * len(lengths), max_model_len // 2),
            vocab_size=vocab_size,
        )
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            break
        try:
            async with asyncio.timeout(left_s):
                points += await measure_load(engine, load, lengths, steps_each=4, seed=num_reqs)
        except TimeoutError:
            await engine.end_sweep()
            break
    if len({point.num_speculative_tokens for point in points}) < 2:
        LOGGER.warning(
            "engine %s: too little was measured within speculation.self_calibration_s %g; the "
            "conservative rule stands until measured steps correct it",
            spec.engine_id,
            budget_s,
        )
        return None
    model, quality = fit(points)
    LOGGER.info(
        "engine %s calibrated itself on %d points, median error %.1f %%",
        spec.engine_id,
        quality.num_points,
        100 * quality.median_relative_error,
    )
    return model


async def measure_load(
    engine: MeasurableEngine,
    load: LoadPoint,
    draft_lengths: Sequence[int],
    *,
    steps_each: int,
    seed: int,
) -> list[CalibrationPoint]:
    """Run one batch while the draft lengths take turns; medians over its steady steps."""
    generator = random.Random(seed)
    sampling = SamplingOptions(temperature=1.0, max_tokens=load.num_tokens, ignore_eos=True)
    name = f"calibration-{load.num_reqs}-{load.num_prompt_tokens}-{seed}"
    requests = [
        GenerateRequest(
            request_id=f"{name}-{index}",
            prompt_token_ids=[
                generator.randrange(load.vocab_size) for _ in range(load.num_prompt_tokens)
            ],
            n=1,
            sampling=sampling,
        )
        for index in range(load.num_reqs)
    ]
    await engine.begin_sweep(draft_lengths, steps_each)
    try:
        await asyncio.gather(*(engine.generate(request) for request in requests))
    finally:
        steps = await engine.end_sweep()
    by_length: dict[int, list[tuple[StepShape, float]]] = defaultdict(list)
    for shape, seconds in steps:
        if shape.is_steady and shape.num_decode_reqs == load.num_reqs:
            by_length[shape.num_speculative_tokens].append((shape, seconds))
    return [
        _point(load, k, measured)
        for k, measured in sorted(by_length.items())
        if len(measured) >= MIN_STEPS
    ]


def _point(
    load: LoadPoint, draft_length: int, measured: Sequence[tuple[StepShape, float]]
) -> CalibrationPoint:
    seconds = [s for _, s in measured]
    quartiles = statistics.quantiles(seconds, n=4)
    return CalibrationPoint(
        num_reqs=load.num_reqs,
        num_kv_tokens=round(statistics.mean(shape.num_kv_tokens for shape, _ in measured)),
        num_speculative_tokens=draft_length,
        num_steps=len(measured),
        median_s=statistics.median(seconds),
        quartiles_s=(quartiles[0], quartiles[2]),
    )


def fit(points: Sequence[CalibrationPoint]) -> tuple[CostModel, FitQuality]:
    """The cost model of measured points."""
    return fit_cost_model(
        [
            MeasuredStep(
                shape=StepShape.steady(
                    point.num_reqs, point.num_kv_tokens, point.num_speculative_tokens
                ),
                duration_s=point.median_s,
            )
            for point in points
        ]
    )


def calibration_loads(
    spec: EngineSpec, *, vocab_size: int, max_model_len: int, num_kv_tokens: int
) -> list[LoadPoint]:
    """Batches of a thorough calibration: 1 to ``max_num_seqs`` sequences, short and long contexts.

    Args:
        num_kv_tokens: what the engine's KV cache holds; larger batches are left out.
    """
    k = spec.speculation.num_speculative_tokens
    num_tokens = 12 * (k + 1) * (k + 2) // 2  # two rounds of six steps of every draft length
    longest = max_model_len - num_tokens - k - 1
    # What a long context adds is one slope: a few batches show it, and their prompts take long.
    kinds = [(min(SHORT_PROMPT, longest), ALL_BATCHES), (min(LONG_PROMPT, longest), LONG_BATCHES)]
    return [
        LoadPoint(
            num_reqs=num_reqs,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=num_tokens,
            vocab_size=vocab_size,
        )
        for num_prompt_tokens, batches in (kinds if longest > SHORT_PROMPT else kinds[:1])
        for num_reqs in batches
        if num_reqs <= spec.engine.max_num_seqs
        and num_reqs * (num_prompt_tokens + num_tokens + 2 * k) <= 0.9 * num_kv_tokens
    ]


async def measure_thoroughly(
    engine: MeasurableEngine,
    loads: Sequence[LoadPoint],
    draft_lengths: Sequence[int],
    report: Callable[[int, LoadPoint], None],
) -> list[CalibrationPoint]:
    """All loads, one after the other; ``report`` hears how many are done and what comes next."""
    points: list[CalibrationPoint] = []
    for number, load in enumerate(loads):
        report(number, load)
        points += await measure_load(engine, load, draft_lengths, steps_each=6, seed=number)
    return points
