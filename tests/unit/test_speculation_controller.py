"""The KV gate: closes at once, opens late, never drafts above the threshold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.speculation.controller import SpeculationController
from rollout_server.speculation.policy import apply_patch
from rollout_server.speculation.steps import EngineLoadSample
from shared.schemas.speculation import SpeculationPatch, SpeculationPolicy
from shared.types import SpeculationMode, SpeculationReason


def policy(**changes: object) -> SpeculationPolicy:
    return SpeculationPolicy.model_validate(
        {
            "mode": SpeculationMode.KV_GATE,
            "num_speculative_tokens": 4,
            "kv_cache_threshold": 0.5,
            "kv_cache_hysteresis": 0.1,
            "min_dwell_steps": 3,
            **changes,
        }
    )


def sample(usage: float, *, current: bool = True) -> EngineLoadSample:
    return EngineLoadSample(
        time_s=0.0,
        kv_cache_usage=usage,
        num_running_reqs=1,
        num_waiting_reqs=0,
        drafter_is_current=current,
    )


def controller_of(policy: SpeculationPolicy, **options: Any) -> SpeculationController:
    return SpeculationController(policy, max_draft_length=4, **options)


def lengths(controller: SpeculationController, usages: list[float]) -> list[int]:
    return [controller.decide(sample(usage)).num_speculative_tokens for usage in usages]


def test_gate_closes_in_the_step_that_reaches_the_threshold() -> None:
    assert lengths(controller_of(policy()), [0.1, 0.49, 0.5, 0.9]) == [4, 4, 0, 0]


def test_gate_stays_closed_between_release_and_threshold() -> None:
    controller = controller_of(policy(min_dwell_steps=0))
    assert lengths(controller, [0.6, 0.49, 0.41, 0.39]) == [0, 0, 0, 4]


def test_gate_stays_closed_for_the_dwell_even_when_the_cache_empties() -> None:
    controller = controller_of(policy(min_dwell_steps=3))
    decisions = [controller.decide(sample(usage)) for usage in [0.6, 0.0, 0.0, 0.0]]
    assert [d.reason for d in decisions] == [
        SpeculationReason.ABOVE_THRESHOLD,
        SpeculationReason.DWELL,
        SpeculationReason.DWELL,
        SpeculationReason.BELOW_THRESHOLD,
    ]


@pytest.mark.parametrize(
    ("mode", "usage", "expected", "reason"),
    [
        (SpeculationMode.OFF, 0.0, 0, SpeculationReason.MODE_OFF),
        (SpeculationMode.ALWAYS, 1.0, 4, SpeculationReason.MODE_ALWAYS),
        (SpeculationMode.KV_GATE, 0.0, 4, SpeculationReason.BELOW_THRESHOLD),
        (SpeculationMode.KV_GATE, 1.0, 0, SpeculationReason.ABOVE_THRESHOLD),
    ],
)
def test_mode_decides_what_the_gate_may_do(
    mode: SpeculationMode, usage: float, expected: int, reason: SpeculationReason
) -> None:
    decision = controller_of(policy(mode=mode)).decide(sample(usage))
    assert (decision.num_speculative_tokens, decision.reason) == (expected, reason)


@pytest.mark.parametrize("mode", [SpeculationMode.ALWAYS, SpeculationMode.KV_GATE])
def test_a_stale_drafter_never_drafts(mode: SpeculationMode) -> None:
    decision = controller_of(policy(mode=mode)).decide(sample(0.0, current=False))
    assert decision.num_speculative_tokens == 0
    assert decision.reason is SpeculationReason.STALE_DRAFTER


def test_a_live_change_takes_effect_at_the_next_decision() -> None:
    controller = controller_of(policy())
    assert lengths(controller, [0.3]) == [4]
    patch = SpeculationPatch(kv_cache_threshold=0.2, num_speculative_tokens=2)
    controller.set_policy(apply_patch(controller.policy, patch))
    assert lengths(controller, [0.3]) == [0]
    assert controller.policy.kv_cache_hysteresis == 0.1, "fields not patched stay"


@given(
    usages=st.lists(st.floats(0, 1), max_size=200),
    threshold=st.floats(0, 1),
    hysteresis=st.floats(0, 0.3),
    dwell=st.integers(0, 10),
)
def test_gate_never_drafts_at_or_above_the_threshold_and_switches_no_faster_than_the_dwell(
    usages: list[float], threshold: float, hysteresis: float, dwell: int
) -> None:
    controller = controller_of(
        policy(
            kv_cache_threshold=threshold,
            kv_cache_hysteresis=min(hysteresis, threshold),
            min_dwell_steps=dwell,
        )
    )
    drafted = lengths(controller, usages)
    closed_for = 0
    for index, (usage, length) in enumerate(zip(usages, drafted, strict=True)):
        if usage >= threshold:
            assert length == 0
        if length == 0:
            closed_for += 1
        else:
            assert index == 0 or closed_for == 0 or closed_for >= dwell
            closed_for = 0


def test_an_absolute_threshold_is_taken_in_tokens_of_the_engines_pool() -> None:
    controller = controller_of(
        policy(kv_cache_threshold_tokens=300, kv_cache_hysteresis=0), kv_capacity_tokens=1000
    )
    assert lengths(controller, [0.29, 0.3]) == [4, 0]


def test_giving_the_fraction_takes_the_absolute_threshold_back() -> None:
    by_tokens = apply_patch(policy(), SpeculationPatch(kv_cache_threshold_tokens=300))
    assert by_tokens.kv_cache_threshold_tokens == 300
    by_fraction = apply_patch(by_tokens, SpeculationPatch(kv_cache_threshold=0.4))
    assert (by_fraction.kv_cache_threshold, by_fraction.kv_cache_threshold_tokens) == (0.4, None)


def test_a_step_that_fills_the_cache_to_the_threshold_does_not_draft_after_all() -> None:
    controller = controller_of(policy())
    decision = controller.decide(sample(0.4))
    assert decision.num_speculative_tokens == 4
    assert controller.confirm(decision, 0.49) == decision
    vetoed = controller.confirm(decision, 0.5)
    assert (vetoed.num_speculative_tokens, vetoed.reason) == (0, SpeculationReason.ABOVE_THRESHOLD)
    assert not controller.gate_is_open


def test_without_room_for_drafts_nothing_is_drafted_even_in_mode_always() -> None:
    for mode in (SpeculationMode.ALWAYS, SpeculationMode.KV_GATE, SpeculationMode.ADAPTIVE):
        crowded = replace(sample(0.1), max_draft_tokens=0)
        decision = controller_of(policy(mode=mode)).decide(crowded)
        assert decision.num_speculative_tokens == 0
        assert decision.reason is SpeculationReason.NO_ROOM
