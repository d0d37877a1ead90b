"""The simulated engine computes what a real one would, and nothing is lost in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean

import pytest

from benchmarks.harness.published_costs import (
    BATCHES,
    CONTEXT,
    MODEL_7B,
    MODELS,
    SPEEDUP_AT_95,
    mean_acceptance_length,
    published_cost_model,
)
from benchmarks.harness.simulated_policies import contenders, policy
from benchmarks.scheduler_sim import published_scenarios
from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from rollout_server.speculation.simulated_batch import SimulatedMemory
from rollout_server.speculation.simulated_load import (
    DISTRIBUTIONS,
    SHORT,
    SimulatedRequest,
    recorded,
    total_tokens,
)
from rollout_server.speculation.simulation import SimulatedMachine, SimulationResult
from rollout_server.speculation.simulator import simulate
from rollout_server.speculation.steps import StepShape
from shared.types import SpeculationMode

MODEL = CostModel(
    target=PiecewiseLinear(knots=(1, 64), values_s=(0.03, 0.06)),
    draft=PiecewiseLinear(knots=(1, 64), values_s=(0.01, 0.02)),
    prefill_row_s=0.001,
    kv_read_s=1e-6,
)
ROOMY = SimulatedMemory(num_kv_blocks=10_000)


def run(
    requests: Sequence[SimulatedRequest],
    mode: SpeculationMode,
    *,
    memory: SimulatedMemory = ROOMY,
    acceptance: float = 0.8,
    seed: int = 0,
    noise: float = 0.0,
) -> SimulationResult:
    machine = SimulatedMachine(cost_model=MODEL, memory=memory, step_noise=noise)
    return simulate(
        requests,
        machine,
        policy(mode, 3, kv_cache_threshold=1.0),
        acceptance_per_pos=[acceptance],
        believed=MODEL,
        seed=seed,
    )


def request(prompt: int, output: int, arrival_s: float = 0.0) -> SimulatedRequest:
    return SimulatedRequest(num_prompt_tokens=prompt, num_output_tokens=output, arrival_s=arrival_s)


def test_plain_decoding_takes_a_prefill_and_a_step_per_further_token() -> None:
    result = run([request(10, 5)], SpeculationMode.OFF)
    prefill = StepShape(
        num_decode_reqs=0,
        num_verified_tokens=0,
        num_prefill_tokens=10,
        num_kv_tokens=0,
        num_speculative_tokens=0,
        num_drafting_reqs=1,
    )
    decoding = [StepShape.steady(1, num_kv_tokens, 0) for num_kv_tokens in (10, 11, 12, 13)]
    assert [step.duration_s for step in result.steps] == pytest.approx(
        [MODEL.step_s(shape) for shape in (prefill, *decoding)]
    )
    assert result.num_tokens == 5


def test_drafts_are_verified_one_step_after_they_were_made() -> None:
    result = run([request(10, 9)], SpeculationMode.ALWAYS, acceptance=1.0)
    # The prompt's step drafts, but there is nothing yet to verify; then four at a time.
    assert [step.num_tokens for step in result.steps] == [1, 4, 4]
    verifying = result.steps[1]
    assert verifying.duration_s == pytest.approx(MODEL.step_s(StepShape.steady(1, 10, 3)))


def test_a_drafter_always_wrong_yields_one_token_a_step() -> None:
    result = run([request(10, 9)], SpeculationMode.ALWAYS, acceptance=0.0)
    assert [step.num_tokens for step in result.steps] == [1] * 9


@pytest.mark.parametrize("mode", list(SpeculationMode))
@pytest.mark.parametrize("num_kv_blocks", [40, 10_000])
def test_every_token_is_generated_whatever_is_drafted_and_however_little_memory_there_is(
    mode: SpeculationMode, num_kv_blocks: int
) -> None:
    requests = [request(20 + 7 * i, 40 + 13 * i, arrival_s=0.1 * i) for i in range(24)]
    memory = SimulatedMemory(num_kv_blocks=num_kv_blocks, max_num_seqs=8, max_num_batched_tokens=64)
    result = run(requests, mode, memory=memory)
    assert result.num_tokens == total_tokens(requests)
    assert max(step.kv_cache_usage for step in result.steps) <= 1.0
    assert max(step.num_running_reqs for step in result.steps) <= 8
    assert (result.num_preemptions > 0) == (num_kv_blocks == 40)


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    requests = SHORT.sample(8, seed=1)
    first, again, other = (
        run(requests, SpeculationMode.ADAPTIVE, seed=seed, noise=0.1) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.time_s != other.time_s


def test_an_engine_without_work_waits_for_the_next_arrival() -> None:
    result = run([request(10, 2), request(10, 2, arrival_s=50.0)], SpeculationMode.OFF)
    assert [step.time_s >= 50.0 for step in result.steps] == [False, False, True, True]


def test_a_request_larger_than_the_cache_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="more memory"):
        run([request(1000, 5)], SpeculationMode.OFF, memory=SimulatedMemory(num_kv_blocks=8))
    with pytest.raises(ValueError, match="more memory"):
        run([request(100, 500)], SpeculationMode.OFF, memory=SimulatedMemory(num_kv_blocks=8))


def test_acceptance_is_drawn_per_position() -> None:
    machine = SimulatedMachine(cost_model=MODEL, memory=ROOMY)
    result = simulate(
        [request(10, 8000)],
        machine,
        policy(SpeculationMode.ALWAYS, 3),
        acceptance_per_pos=[0.9, 0.5, 0.2],
    )
    per_step = result.num_tokens / len(result.steps)
    assert per_step == pytest.approx(1 + 0.9 + 0.45 + 0.09, rel=0.03)


def test_lengths_are_what_they_are_named_after() -> None:
    for lengths in DISTRIBUTIONS:
        outputs = [r.num_output_tokens for r in lengths.sample(1024, seed=0)]
        assert max(outputs) <= lengths.max_tokens
        assert max(outputs) > 2.5 * mean(outputs), "there is a tail"
    short = [r.num_output_tokens for r in SHORT.sample(1024, seed=0)]
    assert mean(short) == pytest.approx(640, rel=0.1)


def test_recorded_lengths_are_read_and_a_line_without_one_is_named() -> None:
    lines = [json.dumps({"num_tokens": 7}), "", json.dumps({"num_tokens": 3, "reward": 1.0})]
    assert [r.num_output_tokens for r in recorded(lines)] == [7, 3]
    with pytest.raises(ValueError, match="line 2: num_tokens is None"):
        recorded([lines[0], json.dumps({"tokens": 3})])


@pytest.mark.parametrize("model", [m for m in MODELS if m.name in SPEEDUP_AT_95], ids=str)
def test_published_cost_models_give_the_published_speedups(model: object) -> None:
    published = next(m for m in MODELS if m == model)
    cost_model, quality = published_cost_model(published)
    for num_drafts, per_batch in SPEEDUP_AT_95[published.name].items():
        for num_reqs in BATCHES:
            kv_tokens = num_reqs * CONTEXT
            speedup = (
                mean_acceptance_length(0.95, num_drafts)
                * cost_model.steady_step_s(num_reqs, kv_tokens, 0)
                / cost_model.steady_step_s(num_reqs, kv_tokens, num_drafts)
            )
            assert speedup == pytest.approx(per_batch[num_reqs], rel=0.06)
    assert quality.median_relative_error < 0.02


def test_distinct_kv_costs_more_only_where_there_is_kv() -> None:
    shared, distinct = (
        published_cost_model(MODEL_7B, distinct_kv=distinct)[0] for distinct in (False, True)
    )
    assert distinct.steady_step_s(8, 0, 3) == shared.steady_step_s(8, 0, 3)
    assert distinct.steady_step_s(8, 50_000, 3) > shared.steady_step_s(8, 50_000, 3)


def test_every_published_scenario_is_compared_under_every_policy() -> None:
    scenarios = published_scenarios()
    assert len({(s.model, s.device) for s in scenarios}) == 6
    names = [contender.name for contender in contenders(scenarios[0])]
    assert names[:3] == ["off", "always", "kv_gate"]
    assert len(set(names)) == len(names) == 7
