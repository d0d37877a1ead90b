"""Calibration over an engine that takes the time a known model says."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.calibration_run import (
    LoadPoint,
    calibrate_itself,
    calibration_loads,
    fit,
    measure_load,
    measure_thoroughly,
)
from rollout_server.engine.protocol import GenerateRequest, GenerateResult
from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from rollout_server.speculation.steps import StepShape
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig

TRUTH = CostModel(
    target=PiecewiseLinear(knots=(1, 64), values_s=(0.03, 0.09)),
    draft=PiecewiseLinear(knots=(1, 64), values_s=(0.008, 0.03)),
    prefill_row_s=0.001,
)


class TimedEngine:
    """Runs nothing: the steps its sweep asks for, each as long as ``TRUTH`` and noise say."""

    def __init__(self, *, seconds_per_request: float = 0.0) -> None:
        self.requests: list[GenerateRequest] = []
        self._lengths: Sequence[int] = ()
        self._steps_each = 1
        self._seconds = seconds_per_request

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        await asyncio.sleep(self._seconds)
        return GenerateResult(engine_id="e", samples=[], generate_s=self._seconds)

    async def begin_sweep(self, draft_lengths: Sequence[int], steps_each: int) -> None:
        self._lengths, self._steps_each = draft_lengths, steps_each
        self._first = len(self.requests)

    async def end_sweep(self) -> list[tuple[StepShape, float]]:
        batch = self.requests[self._first :]
        generator = random.Random(len(batch))
        steps = []
        before = 0
        turns = [k for k in self._lengths for _ in range(self._steps_each)]
        prompt = sum(len(request.prompt_token_ids) for request in batch)
        for k in itertools.chain.from_iterable([turns, turns]):
            steady = StepShape.steady(len(batch), prompt, k)
            shape = StepShape(
                num_decode_reqs=len(batch),
                num_verified_tokens=len(batch) * before,
                num_prefill_tokens=0 if steps else prompt,
                num_kv_tokens=prompt,
                num_speculative_tokens=k,
                num_drafting_reqs=len(batch),
            )
            # Steps between two draft lengths take what they like: they must not be counted.
            seconds = TRUTH.step_s(steady) if before == k and steps else 9.0
            steps.append((shape, seconds * generator.lognormvariate(0, 0.02)))
            before = k
        return steps


def spec(**engine: Any) -> EngineSpec:
    return EngineSpec(
        engine_id="e",
        index=0,
        model=ModelConfig(path="m"),
        engine=EngineConfig.model_validate({"max_num_seqs": 24, **engine}),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(),
        device="cpu",
    )


async def test_only_steady_steps_of_the_whole_batch_are_counted() -> None:
    load = LoadPoint(num_reqs=4, num_prompt_tokens=16, num_tokens=50, vocab_size=100)
    points = await measure_load(TimedEngine(), load, [0, 2, 4], steps_each=6, seed=0)
    assert [point.num_speculative_tokens for point in points] == [0, 2, 4]
    for point in points:
        assert point.num_steps == 10, "two turns of six, the first step of each left out"
        expected = TRUTH.step_s(StepShape.steady(4, 64, point.num_speculative_tokens))
        assert point.median_s == pytest.approx(expected, rel=0.03)


async def test_a_thorough_calibration_finds_the_engines_model() -> None:
    engine = TimedEngine()
    loads = calibration_loads(spec(), vocab_size=100, max_model_len=1024, num_kv_tokens=100_000)
    assert {load.num_reqs for load in loads} == {1, 2, 3, 4, 6, 8, 12, 16, 24}
    assert {load.num_prompt_tokens for load in loads} == {32, 512}
    points = await measure_thoroughly(engine, loads, range(5), lambda number, load: None)
    model, quality = fit(points)
    assert quality.median_relative_error < 0.02
    assert model.ratios(1, 32, 2) == pytest.approx(TRUTH.ratios(1, 32, 2), rel=0.05)
    prompts = [tuple(request.prompt_token_ids) for request in engine.requests]
    assert len(set(prompts)) == len(prompts), "prompts share nothing"


def test_batches_that_the_kv_cache_does_not_hold_are_left_out() -> None:
    loads = calibration_loads(spec(), vocab_size=9, max_model_len=1024, num_kv_tokens=3000)
    assert max(load.num_reqs for load in loads if load.num_prompt_tokens == 32) == 12
    assert max(load.num_reqs for load in loads if load.num_prompt_tokens > 32) == 1


async def calibrated(engine: TimedEngine, budget_s: float) -> CostModel | None:
    return await calibrate_itself(
        engine, spec(), vocab_size=100, max_model_len=512, budget_s=budget_s
    )


async def test_an_engine_calibrates_itself_within_its_budget() -> None:
    model = await calibrated(TimedEngine(), budget_s=10)
    assert model is not None
    for k in (0, 1, 4):
        assert model.steady_step_s(1, 16, k) == pytest.approx(
            TRUTH.steady_step_s(1, 16, k), rel=0.1
        )


async def test_an_engine_too_slow_for_the_budget_stays_with_the_rule() -> None:
    engine = TimedEngine(seconds_per_request=30.0)
    assert await calibrated(engine, budget_s=0.2) is None
