"""The adaptive choice over simulated engines: as good as the best fixed length, and soon again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import pytest

from benchmarks.harness.published_costs import MODEL_7B, MODEL_14B, published_cost_model
from benchmarks.harness.simulated_policies import policy, with_cheap_drafts
from rollout_server.speculation.cost_model import CostModel, PiecewiseLinear
from rollout_server.speculation.simulated_batch import SimulatedMemory
from rollout_server.speculation.simulated_load import SimulatedRequest, steady
from rollout_server.speculation.simulation import (
    SimulatedEvent,
    SimulatedMachine,
    SimulationResult,
)
from rollout_server.speculation.simulator import simulate
from shared.types import SpeculationMode, SpeculationReason

GPU_7B = published_cost_model(MODEL_7B)[0]
GPU_14B = published_cost_model(MODEL_14B)[0]
SLOW_STEPS = CostModel(
    target=PiecewiseLinear(
        knots=(1, 2, 4, 8, 16, 32, 64), values_s=(0.055, 0.057, 0.06, 0.072, 0.105, 0.18, 0.33)
    ),
    draft=PiecewiseLinear(
        knots=(1, 2, 4, 8, 16, 32), values_s=(0.0125, 0.019, 0.026, 0.046, 0.07, 0.12)
    ),
    prefill_row_s=1e-5,
    kv_read_s=1e-6,
    draft_kv_s=5e-7,
    verify_step_s=0.002,
    verify_row_s=0.0005,
)
"""About the 450M model on two CPU cores: a dozen steps a second, so seconds are few steps."""
NOISE = 0.1
GOOD, BAD = (0.95,), (0.3,)


def run(
    model: CostModel,
    requests: Sequence[SimulatedRequest],
    k: int | None,
    *,
    max_k: int,
    until_s: float,
    believed: CostModel | None = None,
    acceptance: tuple[float, ...] = GOOD,
    events: Sequence[SimulatedEvent] = (),
    stall_share: float = 0.0,
    seed: int = 0,
) -> SimulationResult:
    """A fixed draft length, or with None the adaptive choice among all."""
    mode = SpeculationMode.ADAPTIVE
    if k is not None:
        mode = SpeculationMode.ALWAYS if k else SpeculationMode.OFF
    machine = SimulatedMachine(
        cost_model=model,
        memory=SimulatedMemory(num_kv_blocks=10**6, max_num_batched_tokens=10**6),
        step_noise=NOISE,
        stall_share=stall_share,
    )
    return simulate(
        requests,
        machine,
        policy(mode, k or max_k, kv_cache_threshold=1.0),
        acceptance_per_pos=acceptance,
        believed=believed,
        max_draft_length=max_k,
        events=events,
        until_s=until_s,
        seed=seed,
    )


def tokens_between(result: SimulationResult, begin_s: float, end_s: float) -> float:
    """Tokens of a stretch of time, those of steps cut by its ends in proportion."""
    times = [0.0]
    counts = [0]
    for step in result.steps:
        times.append(step.time_s + step.duration_s)
        counts.append(counts[-1] + step.num_tokens)

    def until(moment_s: float) -> float:
        right = min(bisect_right(times, moment_s), len(times) - 1)
        left = right - 1
        share = min((moment_s - times[left]) / (times[right] - times[left]), 1.0)
        return counts[left] + share * (counts[right] - counts[left])

    return until(end_s) - until(begin_s)


@pytest.mark.parametrize("num_reqs", [1, 2, 4, 8, 16, 32, 48, 64])
@pytest.mark.parametrize("model", [GPU_7B, GPU_14B], ids=["7b-accepting", "14b-hardly-accepting"])
def test_at_a_steady_load_adaptive_is_as_good_as_the_best_fixed_length(
    num_reqs: int, model: CostModel
) -> None:
    acceptance = GOOD if model is GPU_7B else (0.7,)
    load = steady(num_reqs, 1024)
    lengths = (0, 2, 3, 4) if model is GPU_7B else (0, 1, 2)
    fixed = [
        run(model, load, k, max_k=4, until_s=12.0, acceptance=acceptance).tokens_per_s
        for k in lengths
    ]
    adaptive = run(model, load, None, max_k=4, until_s=12.0, believed=model, acceptance=acceptance)
    assert adaptive.tokens_per_s >= 0.97 * max(fixed)


@pytest.mark.parametrize("num_reqs", [1, 24, 48])
@pytest.mark.parametrize(
    "believed",
    [with_cheap_drafts(GPU_7B), with_cheap_drafts(GPU_7B, 1 / 1.5), None],
    ids=["drafts_too_cheap", "drafts_too_dear", "conservative"],
)
def test_a_wrong_model_is_corrected_within_seconds(
    num_reqs: int, believed: CostModel | None
) -> None:
    load = steady(num_reqs, 1024)
    fixed = [run(GPU_7B, load, k, max_k=5, until_s=24.0) for k in (0, 2, 3, 5)]
    adaptive = run(GPU_7B, load, None, max_k=5, until_s=24.0, believed=believed)
    best = max(tokens_between(result, 12.0, 24.0) for result in fixed)
    assert tokens_between(adaptive, 12.0, 24.0) >= 0.93 * best
    assert adaptive.tokens_per_s >= 0.95 * fixed[0].tokens_per_s, "never much slower than off"


SLOWED = [SimulatedEvent(time_s=30.0, slow_factor=2.0)]
COLLAPSED_AT_A_PUSH = [
    SimulatedEvent(time_s=30.0, acceptance_per_pos=BAD, weights_changed=True),
    SimulatedEvent(time_s=65.0, acceptance_per_pos=GOOD, weights_changed=True),
]
COLLAPSED_UNANNOUNCED = [
    SimulatedEvent(time_s=30.0, acceptance_per_pos=BAD),
    SimulatedEvent(time_s=65.0, acceptance_per_pos=GOOD, weights_changed=True),
]


@pytest.mark.parametrize("believed", [SLOW_STEPS, None], ids=["calibrated", "conservative"])
@pytest.mark.parametrize(
    ("requests", "events"),
    [
        (steady(1, 500), SLOWED),
        (steady(4, 500), SLOWED),
        (steady(1, 500), COLLAPSED_AT_A_PUSH),
        (steady(4, 500), COLLAPSED_AT_A_PUSH),
        (steady(1, 500), COLLAPSED_UNANNOUNCED),
        (steady(1, 500) + steady(23, 500, arrival_s=30.0), []),
    ],
    ids=["slow-1", "slow-4", "push-1", "push-4", "unannounced-1", "burst-1-to-24"],
)
def test_after_a_fault_the_choice_is_right_again_within_two_seconds_and_off_was_never_much_better(
    requests: Sequence[SimulatedRequest],
    events: Sequence[SimulatedEvent],
    believed: CostModel | None,
) -> None:
    until_s = 100.0 if len(events) > 1 else 65.0
    adaptive = run(
        SLOW_STEPS, requests, None, max_k=4, until_s=until_s, believed=believed, events=events
    )
    fixed = [
        run(SLOW_STEPS, requests, k, max_k=4, until_s=until_s, events=events) for k in range(5)
    ]
    for begin_s in range(0, int(until_s) - 30, 2):
        plain = tokens_between(fixed[0], begin_s, begin_s + 30)
        assert tokens_between(adaptive, begin_s, begin_s + 30) >= 0.9 * plain
    for fault_s in [event.time_s for event in events] or [30.0]:
        best = max(tokens_between(result, fault_s + 2, fault_s + 12) for result in fixed)
        assert tokens_between(adaptive, fault_s + 2, fault_s + 12) >= 0.88 * best


@pytest.mark.parametrize("num_reqs", [1, 16, 40])
def test_noise_and_stalls_cause_few_switches_and_exploration_keeps_to_its_share(
    num_reqs: int,
) -> None:
    result = run(
        GPU_7B,
        steady(num_reqs, 1024),
        None,
        max_k=8,
        until_s=40.0,
        believed=GPU_7B,
        stall_share=0.005,
    )
    steps = result.steps
    settled = [
        step.num_speculative_tokens for step in steps if step.reason != SpeculationReason.EXPLORING
    ]
    switches = sum(a != b for a, b in pairwise(settled))
    assert switches <= 0.01 * len(settled) + 5
    explored = len(steps) - len(settled)
    assert explored <= 0.02 * len(steps) + 3 * 4, "its share, and the three trials of the start"


def test_a_policy_without_exploration_never_explores() -> None:
    machine = SimulatedMachine(
        cost_model=GPU_7B, memory=SimulatedMemory(num_kv_blocks=10**6), step_noise=NOISE
    )
    result = simulate(
        steady(8, 500),
        machine,
        policy(SpeculationMode.ADAPTIVE, 4, exploration_fraction=0.0, kv_cache_threshold=1.0),
        acceptance_per_pos=GOOD,
        until_s=10.0,
    )
    assert all(step.reason is not SpeculationReason.EXPLORING for step in result.steps)
