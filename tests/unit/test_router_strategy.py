"""The pure choice among engines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.router import strategy
from rollout_server.router.sessions import SessionMap
from rollout_server.router.strategy import (
    KV_FULL,
    READY_STATES,
    Demand,
    EngineLoad,
    RouteDecision,
    RouteOutcome,
)
from shared.types import EngineState

SERVING = EngineState.SERVING


def load(
    engine_id: str,
    num_reserved: int = 0,
    state: EngineState = SERVING,
    kv: float = 0.0,
    tokens_each: int = 100,
) -> EngineLoad:
    return EngineLoad(
        engine_id=engine_id,
        state=state,
        num_reserved=num_reserved,
        num_reserved_tokens=num_reserved * tokens_each,
        kv_cache_usage=kv,
    )


def choose_engine(
    loads: list[EngineLoad], num_samples: int, room: int, session_engine: str | None = None
) -> RouteDecision:
    demand = Demand(
        num_samples=num_samples,
        num_tokens=100 * num_samples,
        session_engine_id=session_engine,
    )
    return strategy.choose_engine(loads, demand, room)


def test_the_engine_with_the_fewest_reserved_samples_is_chosen() -> None:
    decision = choose_engine([load("a", 6), load("b", 3), load("c", 5)], 1, 8)
    assert decision.engine_id == "b"


def test_few_long_samples_weigh_more_than_many_short_ones() -> None:
    long = load("long", 2, tokens_each=16_000)
    assert choose_engine([long, load("short", 6)], 1, 8).engine_id == "short"


def test_an_engine_without_free_kv_comes_last_however_little_it_holds() -> None:
    assert choose_engine([load("full", 1, kv=KV_FULL), load("b", 7)], 1, 8).engine_id == "b"
    assert choose_engine([load("full", 1, kv=KV_FULL), load("b", 8)], 1, 8).engine_id == "full"


@pytest.mark.parametrize(
    ("own", "lightest", "chosen"),
    [
        (load("own", 4), load("other", 2), "own"),
        (load("own", 5), load("other", 2), "own"),
        (load("own", 6), load("other", 2), "other"),
        (load("own", 1), load("other", 0), "own"),
        (load("own", 2), load("other", 0), "other"),
        (load("own", 0, kv=KV_FULL), load("other", 0), "other"),
        (load("own", 8), load("other", 7), "other"),
        (load("own", 0, EngineState.DRAINING), load("other", 5), "other"),
    ],
)
def test_a_session_stays_unless_its_engine_is_much_busier(
    own: EngineLoad, lightest: EngineLoad, chosen: str
) -> None:
    assert choose_engine([lightest, own], 1, 8, session_engine="own").engine_id == chosen


def test_a_session_whose_engine_is_gone_starts_anywhere() -> None:
    assert choose_engine([load("a", 1), load("b")], 1, 8, session_engine="gone").engine_id == "b"


def test_sessions_that_are_silent_longest_are_forgotten_first() -> None:
    sessions = SessionMap(max_sessions=2)
    for name, engine in (("x", "a"), ("y", "b"), ("x", "c"), ("z", "d"), (None, "e")):
        sessions.note(name, engine)
    assert [sessions.engine_of(name) for name in ("x", "y", "z", None)] == ["c", None, "d", None]


def test_kv_usage_then_creation_order_break_ties() -> None:
    assert choose_engine([load("a", 2, kv=0.9), load("b", 2, kv=0.1)], 1, 8).engine_id == "b"
    assert choose_engine([load("a", 2), load("b", 2)], 1, 8).engine_id == "a"


def test_a_group_waits_for_room_rather_than_being_split_or_squeezed_in() -> None:
    decision = choose_engine([load("a", 6), load("b", 7)], 4, 8)
    assert decision.outcome is RouteOutcome.WAIT_FOR_ROOM


def test_a_group_larger_than_an_engines_room_goes_to_an_empty_engine() -> None:
    assert choose_engine([load("a", 1), load("b")], 100, 8).engine_id == "b"
    assert choose_engine([load("a", 1)], 100, 8).outcome is RouteOutcome.WAIT_FOR_ROOM


@pytest.mark.parametrize("state", [EngineState.PAUSED, EngineState.SYNCING])
def test_a_paused_or_syncing_engine_is_queued_to_only_when_none_serves(state: EngineState) -> None:
    assert choose_engine([load("a", 0, state), load("b", 7)], 1, 8).engine_id == "b"
    full = choose_engine([load("a", 0, state), load("b", 8)], 1, 8)
    assert full.outcome is RouteOutcome.WAIT_FOR_ROOM
    alone = [load("a", 0, state), load("b", 0, EngineState.DEAD)]
    assert choose_engine(alone, 1, 8).engine_id == "a"


@pytest.mark.parametrize("state", [EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD])
def test_engines_that_take_nothing_are_waited_for(state: EngineState) -> None:
    decision = choose_engine([load("a", 0, state)], 1, 8)
    assert decision.outcome is RouteOutcome.WAIT_FOR_ENGINE
    assert decision.engine_id is None


def test_without_engines_the_group_waits_for_one() -> None:
    assert choose_engine([], 1, 8).outcome is RouteOutcome.WAIT_FOR_ENGINE


@given(
    st.lists(st.tuples(st.sampled_from(EngineState), st.integers(0, 20)), max_size=6),
    st.integers(1, 30),
    st.integers(1, 20),
)
def test_a_placement_never_exceeds_the_room_and_never_lands_on_a_dead_engine(
    engines: list[tuple[EngineState, int]], num_samples: int, room: int
) -> None:
    loads = [load(str(i), reserved, state) for i, (state, reserved) in enumerate(engines)]
    decision = choose_engine(loads, num_samples, room)
    if decision.outcome is not RouteOutcome.PLACE:
        assert decision.engine_id is None
        return
    chosen = next(item for item in loads if item.engine_id == decision.engine_id)
    assert chosen.state in READY_STATES
    assert chosen.num_reserved == 0 or chosen.num_reserved + num_samples <= room
