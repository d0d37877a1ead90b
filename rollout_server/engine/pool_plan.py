"""Which engines to start and which to drain, given what is wanted and what lives. Pure.

Example, with a pool ``a`` that wants 2 engines::

    e0 SERVING, e1 DRAINING                -> start 1
    e0 SERVING, e1 STARTING                -> nothing
    e0 SERVING, e1 SERVING, e2 STARTING    -> nothing: e2 is drained once it serves
    e0 SERVING, e1 PAUSED, e2 SERVING      -> drain e2
    e0 SERVING, and a may not start any    -> nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.types import EngineState

LIVE_STATES = frozenset(
    {EngineState.STARTING, EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING}
)
"""States of engines that count as being there."""
DRAINABLE_STATES = frozenset({EngineState.SERVING, EngineState.PAUSED})
"""An engine in the middle of a start or a commit is left alone until it has finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """An engine the pools have."""

    engine_id: str
    pool: str
    state: EngineState


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What one pool shall have."""

    pool: str
    target_count: int
    may_start: bool
    """False while it backs off or is quarantined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPlan:
    """What to do now."""

    starts: dict[str, int]
    """How many, by pool; pools that start none are left out."""
    drains: list[str]
    """Engine ids."""


def plan(members: Sequence[Member], wishes: Sequence[Wish]) -> PoolPlan:
    """Newest engines are drained first: the longest-serving ones hold the warmest caches.

    Args:
        members: of all pools, in order of creation.
    """
    starts: dict[str, int] = {}
    drains: list[str] = []
    for wish in wishes:
        live = [m for m in members if m.pool == wish.pool and m.state in LIVE_STATES]
        num_missing = wish.target_count - len(live)
        if num_missing > 0 and wish.may_start:
            starts[wish.pool] = num_missing
        surplus = live[wish.target_count :]
        drains += [m.engine_id for m in reversed(surplus) if m.state in DRAINABLE_STATES]
    return PoolPlan(starts=starts, drains=drains)
