"""When lost engines are replaced: backoff, budget, quarantine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engine.restarts import RestartLimits, Restarts
from shared.pool_types import RESTART_TRANSITIONS, RestartState

LIMITS = RestartLimits(backoff_s=1.0, max_backoff_s=8.0, budget=6, window_s=600.0)


def fail(restarts: Restarts, now_s: float, target_count: int = 1) -> float:
    """The next attempt fails; when there may be another."""
    restarts.lost(now_s, "it broke", target_count)
    return now_s + restarts.wait_s(now_s)


def test_the_wait_doubles_with_each_failed_attempt_up_to_its_limit() -> None:
    restarts = Restarts(LIMITS)
    now_s, waits = 0.0, []
    for _ in range(6):
        next_s = fail(restarts, now_s)
        waits.append(next_s - now_s)
        assert restarts.state(next_s - 0.01) is RestartState.BACKING_OFF
        assert restarts.state(next_s) is RestartState.READY
        now_s = next_s
    assert waits == [1, 2, 4, 8, 8, 8]


def test_an_engine_that_serves_makes_the_next_wait_short_again() -> None:
    restarts = Restarts(LIMITS)
    now_s = fail(restarts, fail(restarts, 0.0))
    restarts.served()
    assert fail(restarts, now_s) == now_s + 1


def test_engines_lost_at_one_time_wait_as_one() -> None:
    restarts = Restarts(LIMITS)
    for _ in range(5):
        restarts.lost(10.0, "its node is gone", 8)
    assert restarts.wait_s(10.0) == 1
    assert restarts.num_in_window(10.0) == 5
    assert restarts.num_in_row == 1


def test_one_loss_over_the_budget_quarantines_and_time_does_not_end_it() -> None:
    restarts = Restarts(LIMITS)
    now_s = 0.0
    for _ in range(6):
        now_s = fail(restarts, now_s)
    assert restarts.state(now_s) is RestartState.READY
    fail(restarts, now_s)
    assert restarts.state(now_s + 10_000) is RestartState.QUARANTINED
    assert restarts.wait_s(now_s) == 0
    assert restarts.last_reason == "it broke"


def test_the_budget_grows_with_the_engines_asked_for() -> None:
    small, large = Restarts(LIMITS), Restarts(LIMITS)
    for _ in range(7):
        small.lost(0.0, "x", 1)
        large.lost(0.0, "x", 4)
    assert small.state(100.0) is RestartState.QUARANTINED
    assert large.state(100.0) is RestartState.READY


def test_losses_leave_the_window() -> None:
    restarts = Restarts(LIMITS)
    for number in range(30):
        restarts.lost(number * 101.0, "now and then", 1)
        restarts.served()
        assert restarts.state(number * 101.0 + 1) is RestartState.READY
    assert restarts.num_in_window(29 * 101.0) == 6


def test_a_budget_of_zero_quarantines_at_the_first_loss() -> None:
    none = RestartLimits(backoff_s=1.0, max_backoff_s=8.0, budget=0, window_s=600.0)
    restarts = Restarts(none)
    restarts.lost(0.0, "x", 3)
    assert restarts.state(0.0) is RestartState.QUARANTINED


def test_an_operator_ends_a_quarantine_and_its_memory() -> None:
    restarts = Restarts(LIMITS)
    for _ in range(7):
        restarts.lost(0.0, "x", 1)
    restarts.clear()
    assert restarts.state(0.0) is RestartState.READY
    assert restarts.num_in_window(0.0) == 0
    assert restarts.last_reason is None
    assert fail(restarts, 0.0) == 1


STEPS = st.lists(
    st.tuples(st.sampled_from(["lost", "served", "clear", "wait"]), st.floats(0, 300)), max_size=60
)


@given(STEPS)
def test_whatever_happens_states_follow_the_table_and_waits_stay_in_their_limits(
    steps: list[tuple[str, float]],
) -> None:
    restarts, now_s = Restarts(LIMITS), 0.0
    before = restarts.state(now_s)
    for what, passed_s in steps:
        now_s += passed_s
        between = restarts.state(now_s)
        assert between is before or between in RESTART_TRANSITIONS[before]
        if what == "lost":
            restarts.lost(now_s, "x", 1)
        elif what == "served":
            restarts.served()
        elif what == "clear":
            restarts.clear()
        after = restarts.state(now_s)
        assert after is between or after in RESTART_TRANSITIONS[between]
        assert 0 <= restarts.wait_s(now_s) <= LIMITS.max_backoff_s
        if after is RestartState.QUARANTINED and between is not after:
            assert restarts.num_in_window(now_s) > LIMITS.budget
        before = after
