"""When an engine that serves gets no groups: failures, time, probes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.router.circuit_breaker import BreakerLimits, CircuitBreaker, Ticket
from shared.config.routing import CircuitBreakerConfig
from shared.pool_types import CIRCUIT_TRANSITIONS, CircuitState

LIMITS = BreakerLimits(num_failures=3, open_s=5.0, max_open_s=30.0)
CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


def fail(breaker: CircuitBreaker, now_s: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(breaker.dispatched(now_s), now_s)


def opened() -> CircuitBreaker:
    """At 0 s."""
    breaker = CircuitBreaker("a", LIMITS)
    fail(breaker, 0.0, times=3)
    return breaker


def test_it_opens_with_the_last_of_so_many_failures_in_a_row() -> None:
    breaker = CircuitBreaker("a", LIMITS)
    fail(breaker, 0.0, times=2)
    breaker.succeeded(breaker.dispatched(0.0))
    fail(breaker, 0.0, times=2)
    assert breaker.admits(0.0)
    fail(breaker, 0.0)
    assert breaker.state(0.0) is OPEN
    assert not breaker.admits(4.9)
    assert breaker.open_for_s(1.0) == 4


def test_after_its_time_one_group_is_let_through_and_decides() -> None:
    breaker = opened()
    assert breaker.state(5.0) is HALF_OPEN
    assert breaker.admits(5.0)
    probe = breaker.dispatched(5.0)
    assert probe.is_probe
    assert not breaker.admits(1000.0), "while it is out, for whatever time"
    breaker.succeeded(probe)
    assert breaker.state(1000.0) is CLOSED
    assert not breaker.dispatched(1000.0).is_probe


def test_each_probe_that_fails_doubles_the_time_up_to_its_limit() -> None:
    breaker, now_s, waits = opened(), 0.0, []
    for _ in range(5):
        waits.append(breaker.open_for_s(now_s))
        now_s += waits[-1]
        fail(breaker, now_s)
    assert waits == [5, 10, 20, 30, 30]


def test_a_group_that_finishes_makes_the_next_time_short_again() -> None:
    breaker = opened()
    fail(breaker, 5.0)
    breaker.succeeded(breaker.dispatched(15.0))
    fail(breaker, 20.0, times=3)
    assert breaker.open_for_s(20.0) == 5


def test_tokens_of_the_probe_close_it_but_nothing_is_forgotten() -> None:
    breaker = opened()
    probe = breaker.dispatched(5.0)
    breaker.progressed(probe)
    assert breaker.state(5.0) is CLOSED
    breaker.failed(probe, 6.0)
    assert breaker.state(6.0) is OPEN, "one failure is enough"
    assert breaker.open_for_s(6.0) == 10


def test_tokens_while_it_is_closed_are_no_success() -> None:
    breaker = CircuitBreaker("a", LIMITS)
    fail(breaker, 0.0, times=2)
    breaker.progressed(breaker.dispatched(0.0))
    fail(breaker, 0.0)
    assert breaker.state(0.0) is OPEN


def test_a_probe_that_tells_nothing_leaves_its_place_to_the_next() -> None:
    breaker = opened()
    breaker.withdrawn(breaker.dispatched(5.0))
    assert breaker.state(5.0) is HALF_OPEN
    assert breaker.admits(5.0)


def test_groups_from_before_it_opened_change_nothing() -> None:
    breaker = CircuitBreaker("a", LIMITS)
    old = [breaker.dispatched(0.0) for _ in range(8)]
    fail(breaker, 0.0, times=3)
    breaker.succeeded(old[0])
    breaker.failed(old[1], 1.0)
    assert breaker.open_for_s(0.0) == 5
    probe = breaker.dispatched(5.0)
    breaker.failed(old[2], 5.0)
    breaker.succeeded(old[3])
    breaker.withdrawn(old[4])
    breaker.progressed(old[5])
    assert breaker.state(5.0) is HALF_OPEN
    assert not breaker.admits(5.0)
    breaker.succeeded(probe)
    breaker.failed(old[6], 6.0)
    breaker.failed(old[7], 6.0)
    fail(breaker, 6.0)
    assert breaker.state(6.0) is CLOSED


def test_a_group_given_to_an_open_one_is_its_probe_before_the_time() -> None:
    breaker = opened()
    probe = breaker.dispatched(1.0)
    assert probe.is_probe
    breaker.succeeded(probe)
    assert breaker.state(1.0) is CLOSED


def test_it_remembers_when_something_failed_last() -> None:
    breaker = CircuitBreaker("a", LIMITS)
    assert breaker.last_failed_s == float("-inf")
    first, second = breaker.dispatched(0.0), breaker.dispatched(0.0)
    breaker.failed(first, 2.0)
    breaker.failed(second, 1.0)
    assert breaker.last_failed_s == 2.0


def test_a_configuration_that_is_off_has_no_limits() -> None:
    assert BreakerLimits.of(CircuitBreakerConfig(enabled=False)) is None
    limits = BreakerLimits.of(CircuitBreakerConfig())
    assert limits == BreakerLimits(num_failures=5, open_s=5.0, max_open_s=120.0)


ENDS = ("succeeded", "failed", "withdrawn", "progressed")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["dispatched", "dispatched", "failed", *ENDS]),
        st.integers(0, 7),
        st.floats(0, 20),
    ),
    max_size=80,
)


def seen(breaker: CircuitBreaker, now_s: float) -> tuple[CircuitState, bool, float]:
    return breaker.state(now_s), breaker.admits(now_s), breaker.open_for_s(now_s)


def tell(breaker: CircuitBreaker, what: str, ticket: Ticket, now_s: float) -> None:
    if what == "failed":
        breaker.failed(ticket, now_s)
    elif what == "succeeded":
        breaker.succeeded(ticket)
    elif what == "withdrawn":
        breaker.withdrawn(ticket)
    else:
        breaker.progressed(ticket)


@given(STEPS, st.booleans())
def test_whatever_happens_it_follows_the_table_and_lets_one_probe_through(
    steps: list[tuple[str, int, float]], is_only_engine: bool
) -> None:
    breaker, now_s = CircuitBreaker("a", LIMITS), 0.0
    current: list[Ticket] = []
    stale: list[Ticket] = []
    num_in_row = 0
    before = CLOSED
    for what, which, passed_s in steps:
        now_s += passed_s
        between = breaker.state(now_s)
        assert between is before or (before, between) == (OPEN, HALF_OPEN), "by time alone"
        if what == "dispatched":
            if breaker.admits(now_s) or is_only_engine:
                current.append(breaker.dispatched(now_s))
        elif stale and (which % 2 or not current):
            as_it_was = seen(breaker, now_s)
            tell(breaker, what, stale.pop(), now_s)
            assert seen(breaker, now_s) == as_it_was, "a group of before it opened"
        elif current:
            ticket = current[which % len(current)]
            if what != "progressed":
                current.remove(ticket)
            tell(breaker, what, ticket, now_s)
            num_in_row = {"failed": num_in_row + 1, "succeeded": 0}.get(what, num_in_row)
        after = breaker.state(now_s)
        assert after is between or after in CIRCUIT_TRANSITIONS[between]
        assert 0 <= breaker.open_for_s(now_s) <= LIMITS.max_open_s
        if after is OPEN and between is not OPEN:
            assert what == "failed"
            stale, current = stale + current, []
            num_in_row = 0
        if after is CLOSED:
            assert num_in_row < LIMITS.num_failures
        if after is HALF_OPEN and not is_only_engine:
            assert len(current) <= 1
            assert breaker.admits(now_s) == (not current)
        before = after
    later_s = now_s + LIMITS.max_open_s
    if before is OPEN:
        assert breaker.admits(later_s), "no engine is shut out for ever"
