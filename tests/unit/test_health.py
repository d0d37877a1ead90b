"""An engine that holds work and makes no token is sick; a slow one is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.health import (
    EXPECTED_TO_PROGRESS,
    HealthLimits,
    Poll,
    Vitals,
    after_answer,
    after_timeout,
    judge,
)
from shared.pool_types import EngineHealth, Sickness
from shared.types import EngineState

LIMITS = HealthLimits(progress_timeout_s=120.0, max_status_timeouts=3, status_timeout_s=15.0)
HEALTHY, SLOW, SICK = EngineHealth.HEALTHY, EngineHealth.SLOW, EngineHealth.SICK
BUSY = Poll(
    time_s=0.0, state=EngineState.SERVING, num_requests=4, num_tokens=100, kv_cache_usage=0.5
)


def heard(*polls: Poll) -> Vitals:
    vitals = None
    for poll in polls:
        vitals = after_answer(vitals, poll)
    assert vitals is not None
    return vitals


def at(time_s: float, **changes: object) -> Poll:
    return replace(BUSY, time_s=time_s, **changes)  # type: ignore[arg-type]


def health_of(*polls: Poll) -> EngineHealth:
    return judge(heard(*polls), LIMITS).health


@pytest.mark.parametrize(
    ("stood_s", "health"), [(29, HEALTHY), (30, SLOW), (119, SLOW), (120, SICK)]
)
def test_work_without_a_token_is_slow_and_then_sick(stood_s: float, health: EngineHealth) -> None:
    assert health_of(BUSY, at(10.0, num_tokens=101), at(10.0 + stood_s, num_tokens=101)) is health


def test_the_verdict_says_what_stood_still_and_which_setting_to_turn() -> None:
    verdict = judge(heard(BUSY, at(150.0)), LIMITS)
    assert verdict.sickness is Sickness.NO_PROGRESS
    assert "4 requests" in verdict.reason
    assert "150.0 s (engine.progress_timeout_s 120)" in verdict.reason


def test_a_slow_engine_that_makes_a_token_now_and_then_is_never_given_up() -> None:
    polls = [at(100.0 * number, num_tokens=100 + number) for number in range(50)]
    assert {judge(heard(*polls[: n + 1]), LIMITS).health for n in range(50)} == {HEALTHY}


def test_an_engine_that_computes_a_long_prompt_progresses() -> None:
    assert health_of(BUSY, at(100.0, kv_cache_usage=0.6), at(200.0, kv_cache_usage=0.6)) is SLOW


def test_an_idle_engine_may_stand_still() -> None:
    assert health_of(at(0.0, num_requests=0), at(5000.0, num_requests=0)) is HEALTHY


def test_the_clock_of_an_engine_that_gets_work_starts_with_it() -> None:
    idle = at(0.0, num_requests=0)
    assert health_of(idle, at(1000.0), at(1010.0)) is HEALTHY
    assert health_of(idle, at(1000.0), at(1120.0)) is SICK


@pytest.mark.parametrize("state", sorted(set(EngineState) - EXPECTED_TO_PROGRESS))
def test_an_engine_that_was_told_to_stand_still_is_not_judged(state: EngineState) -> None:
    still = at(500.0, state=state)
    assert health_of(BUSY, still) is HEALTHY
    assert health_of(BUSY, still, at(600.0)) is HEALTHY, "its clock starts anew"
    assert health_of(BUSY, still, at(600.0), at(720.0)) is SICK


def test_a_draining_engine_is_judged_like_a_serving_one() -> None:
    assert health_of(BUSY, at(130.0, state=EngineState.DRAINING)) is SICK


def test_three_late_answers_in_a_row_are_sick() -> None:
    vitals = heard(BUSY)
    verdicts = []
    for number in range(3):
        vitals = after_timeout(vitals, 15.0 * (number + 1), EngineState.SERVING)
        verdicts.append(judge(vitals, LIMITS))
    assert [verdict.health for verdict in verdicts] == [SLOW, SLOW, SICK]
    assert verdicts[2].sickness is Sickness.NO_STATUS
    assert "15 s (engine.status_timeout_s) 3 times" in verdicts[2].reason


def test_an_answer_ends_the_row_but_not_the_time_without_progress() -> None:
    vitals = heard(BUSY)
    for _ in range(2):
        vitals = after_timeout(vitals, 30.0, EngineState.SERVING)
    vitals = after_answer(vitals, at(60.0))
    assert judge(vitals, LIMITS).health is SLOW
    vitals = after_timeout(vitals, 75.0, EngineState.SERVING)
    assert vitals.num_timeouts == 1
    assert judge(after_answer(vitals, at(120.0)), LIMITS).sickness is Sickness.NO_PROGRESS


def test_a_commit_that_answers_nothing_for_long_is_neither_late_nor_without_progress() -> None:
    vitals = heard(BUSY)
    for number in range(20):
        vitals = after_timeout(vitals, 15.0 * number, EngineState.SYNCING)
    assert vitals.num_timeouts == 0
    assert judge(vitals, LIMITS).health is HEALTHY
    assert judge(after_answer(vitals, at(310.0)), LIMITS).health is HEALTHY


def test_an_engine_that_never_answered_is_given_up_too() -> None:
    vitals = None
    for number in range(3):
        vitals = after_timeout(vitals, 15.0 * number, EngineState.SERVING)
    assert vitals is not None
    assert judge(vitals, LIMITS).sickness is Sickness.NO_STATUS


STEPS = st.lists(
    st.tuples(
        st.floats(0.1, 100.0),
        st.sampled_from(EngineState),
        st.integers(0, 3),
        st.integers(0, 2),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@given(STEPS)
def test_an_engine_is_given_up_only_for_what_it_did_all_the_time(
    steps: list[tuple[float, EngineState, int, int, bool]],
) -> None:
    """Against the histories themselves: no token for the whole time, or three late answers."""
    vitals: Vitals | None = None
    time_s, num_tokens, num_late = 0.0, 0, 0
    still_since_s: float | None = None
    for passed_s, state, num_requests, num_new_tokens, is_late in steps:
        time_s += passed_s
        expected = state in EXPECTED_TO_PROGRESS
        if is_late:
            num_late = num_late + 1 if expected else 0
            still_since_s = still_since_s if expected else None
            vitals = after_timeout(vitals, time_s, state)
        else:
            num_late = 0
            if num_new_tokens or not expected or not num_requests or still_since_s is None:
                still_since_s = time_s if expected and num_requests else None
            num_tokens += num_new_tokens
            poll = Poll(
                time_s=time_s,
                state=state,
                num_requests=num_requests,
                num_tokens=num_tokens,
                kv_cache_usage=0.0,
            )
            vitals = after_answer(vitals, poll)
        sickness = judge(vitals, LIMITS).sickness
        if sickness is Sickness.NO_STATUS:
            assert num_late >= LIMITS.max_status_timeouts
        elif sickness is Sickness.NO_PROGRESS:
            assert still_since_s is not None
            assert time_s - still_since_s >= LIMITS.progress_timeout_s - 1e-9
        else:
            assert num_late < LIMITS.max_status_timeouts
            if not is_late and still_since_s is not None:
                assert time_s - still_since_s < LIMITS.progress_timeout_s + 1e-9
