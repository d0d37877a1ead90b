"""The pure choice among engines, some of which have failed lately or are to relieve others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.router.strategy import (
    KV_FULL,
    Demand,
    EngineLoad,
    RouteOutcome,
    choose_engine,
    choose_relief,
)
from shared.types import EngineState

ROOM = 8


def load(
    engine_id: str,
    num_reserved: int = 0,
    *,
    state: EngineState = EngineState.SERVING,
    kv: float = 0.0,
    admitted: bool = True,
    failed_s: float = float("-inf"),
) -> EngineLoad:
    return EngineLoad(
        engine_id=engine_id,
        state=state,
        num_reserved=num_reserved,
        num_reserved_tokens=100 * num_reserved,
        kv_cache_usage=kv,
        is_admitted=admitted,
        last_failed_s=failed_s,
    )


def demand(num_samples: int = 1, session: str | None = None) -> Demand:
    return Demand(num_samples=num_samples, num_tokens=100 * num_samples, session_engine_id=session)


def test_an_engine_that_is_not_admitted_gets_nothing_while_another_serves() -> None:
    bad, busy = load("bad", admitted=False, failed_s=1.0), load("busy", 7)
    assert choose_engine([bad, busy], demand(), ROOM).engine_id == "busy"
    assert choose_engine([bad, busy], demand(2), ROOM).outcome is RouteOutcome.WAIT_FOR_ROOM
    assert choose_engine([bad, busy], demand(session="bad"), ROOM).engine_id == "busy"


def test_where_none_is_admitted_the_failure_longest_ago_counts_and_not_the_load() -> None:
    older = load("older", 6, admitted=False, failed_s=1.0)
    newer = load("newer", 0, admitted=False, failed_s=2.0)
    assert choose_engine([newer, older], demand(), ROOM).engine_id == "older"
    assert choose_engine([newer, older], demand(3), ROOM).engine_id == "newer", "it has room"


def test_an_engine_that_waits_for_a_commit_is_no_reason_to_wait() -> None:
    bad = load("bad", admitted=False, failed_s=1.0)
    syncing = load("syncing", state=EngineState.SYNCING)
    assert choose_engine([bad, syncing], demand(), ROOM).engine_id == "bad"


LOADS = st.lists(
    st.builds(
        load,
        st.sampled_from("abcdefgh"),
        st.integers(0, ROOM),
        state=st.sampled_from(EngineState),
        kv=st.floats(0, 1),
        admitted=st.booleans(),
        failed_s=st.floats(0, 100),
    ),
    max_size=6,
    unique_by=lambda one: one.engine_id,
)


@given(LOADS, st.integers(1, ROOM))
def test_whatever_the_loads_an_unadmitted_engine_is_the_last_choice_and_never_a_refusal(
    loads: list[EngineLoad], num_samples: int
) -> None:
    decision = choose_engine(loads, demand(num_samples), ROOM)
    serving = [one for one in loads if one.state is EngineState.SERVING]
    chosen = next((one for one in loads if one.engine_id == decision.engine_id), None)
    if any(one.is_admitted for one in serving):
        assert chosen is None or chosen.is_admitted
    elif any(one.num_reserved == 0 for one in serving):
        assert chosen is not None, "tried rather than refused"
        others = [one for one in serving if one.num_reserved == 0]
        assert chosen.last_failed_s <= min(one.last_failed_s for one in others)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([load("b", 2)], "b"),
        ([load("b", 3)], None),
        ([load("b", 2), load("c", 1)], "c"),
        ([load("b", 0, admitted=False)], None),
        ([load("b", 0, kv=KV_FULL)], None),
        ([load("b", 0, state=EngineState.DRAINING)], None),
        ([load("b", 0, state=EngineState.PAUSED)], None),
        ([], None),
    ],
)
def test_late_samples_go_to_an_engine_that_holds_at_most_half_as_much(
    others: list[EngineLoad], chosen: str | None
) -> None:
    assert choose_relief([load("own", 5), *others], "own", demand(2), ROOM) == chosen


def test_late_samples_never_come_back_to_their_own_engine_nor_overfill_another() -> None:
    assert choose_relief([load("own", 0)], "own", demand(), ROOM) is None
    own, fuller = load("own", 14), load("b", 7)
    assert choose_relief([own, fuller], "own", demand(1), ROOM) == "b"
    assert choose_relief([own, fuller], "own", demand(2), ROOM) is None
