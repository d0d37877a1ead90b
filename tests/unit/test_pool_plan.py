"""Which engines are started and drained, for any pools and states."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engine.pool_plan import (
    DRAINABLE_STATES,
    LIVE_STATES,
    Member,
    Wish,
    plan,
)
from shared.types import EngineState

STARTING, SERVING, PAUSED = EngineState.STARTING, EngineState.SERVING, EngineState.PAUSED
SYNCING, DRAINING = EngineState.SYNCING, EngineState.DRAINING


def members(*states: EngineState, pool: str = "a") -> list[Member]:
    return [Member(engine_id=f"{pool}{i}", pool=pool, state=s) for i, s in enumerate(states)]


def wish(count: int, pool: str = "a", *, may_start: bool = True) -> Wish:
    return Wish(pool=pool, target_count=count, may_start=may_start)


def test_what_is_missing_is_started_and_draining_engines_do_not_count() -> None:
    todo = plan(members(SERVING, DRAINING, EngineState.DEAD), [wish(3)])
    assert (todo.starts, todo.drains) == ({"a": 2}, [])


def test_an_engine_that_starts_counts_already() -> None:
    assert plan(members(SERVING, STARTING), [wish(2)]).starts == {}


def test_the_newest_surplus_engine_is_drained_first() -> None:
    assert plan(members(SERVING, PAUSED, SERVING), [wish(1)]).drains == ["a2", "a1"]


def test_a_surplus_engine_in_a_start_or_a_commit_is_left_alone() -> None:
    assert plan(members(SERVING, SYNCING, STARTING), [wish(1)]).drains == []


def test_a_pool_that_may_not_start_still_drains() -> None:
    assert plan(members(SERVING), [wish(3, may_start=False)]).starts == {}
    assert plan(members(SERVING, SERVING), [wish(1, may_start=False)]).drains == ["a1"]


def test_pools_do_not_count_each_others_engines() -> None:
    both = members(SERVING, SERVING) + members(SERVING, pool="b")
    todo = plan(both, [wish(1), wish(3, "b")])
    assert (todo.starts, todo.drains) == ({"b": 2}, ["a1"])


ANY_MEMBERS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(EngineState)), max_size=12)
ANY_WISHES = st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans(), st.booleans())


@given(ANY_MEMBERS, ANY_WISHES)
def test_following_the_plan_never_misses_nor_exceeds_the_wish(
    drawn: list[tuple[str, EngineState]], wanted: tuple[int, int, bool, bool]
) -> None:
    have = [
        Member(engine_id=f"e{index}", pool=pool, state=state)
        for index, (pool, state) in enumerate(drawn)
    ]
    wishes = [wish(wanted[0], may_start=wanted[2]), wish(wanted[1], "b", may_start=wanted[3])]
    todo = plan(have, wishes)
    by_id = {member.engine_id: member for member in have}
    assert len(set(todo.drains)) == len(todo.drains)
    assert all(by_id[engine_id].state in DRAINABLE_STATES for engine_id in todo.drains)
    for one in wishes:
        live = [m for m in have if m.pool == one.pool and m.state in LIVE_STATES]
        num_started = todo.starts.get(one.pool, 0)
        num_drained = sum(by_id[engine_id].pool == one.pool for engine_id in todo.drains)
        assert not (num_started and num_drained)
        assert len(live) - num_drained >= min(len(live), one.target_count)
        if one.may_start:
            assert len(live) + num_started >= one.target_count
        assert len(live) + num_started <= max(len(live), one.target_count)
