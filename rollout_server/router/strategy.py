"""Pure routing decisions over frozen records of engine load. No clock, no I/O.

Example, with room for 8 samples per engine and a group of 4 to place::

    a SERVING 6 reserved, b SERVING 3 reserved  -> b   (a has no room for 4, b has)
    a SERVING 6 reserved, b SERVING 7 reserved  -> wait for room
    a SYNCING 0 reserved, b SERVING 7 reserved  -> wait for room on b: a would only hold it up
    a SYNCING 0 reserved, b DEAD                -> a   (it goes on by itself after the commit)
    a STARTING, b DEAD                          -> wait for an engine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.types import EngineState

READY_STATES = frozenset({EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING})
"""States in which an engine takes requests, at once or after a resume."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """What routing knows of one engine."""

    engine_id: str
    state: EngineState
    num_reserved: int
    """Samples handed to the engine and not yet had back."""
    kv_cache_usage: float
    """Fraction 0..1, as of the last status poll; breaks ties only."""


class RouteOutcome(StrEnum):
    """What to do with a group now."""

    PLACE = "place"
    WAIT_FOR_ROOM = "wait_for_room"
    """Engines are there and full: a release will make room."""
    WAIT_FOR_ENGINE = "wait_for_engine"
    """No engine can take anything: one has to start or come back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteDecision:
    """``engine_id`` is set exactly when ``outcome`` is PLACE."""

    outcome: RouteOutcome
    engine_id: str | None = None


def choose_engine(
    loads: Sequence[EngineLoad], num_samples: int, max_samples_per_engine: int
) -> RouteDecision:
    """Pick the engine with the fewest reserved samples that has room for the whole group.

    Only when no engine is SERVING may a PAUSED or SYNCING one be queued to. A group larger than
    ``max_samples_per_engine`` goes to an engine that holds nothing else, or it could never run.

    Args:
        loads: every engine, in order of creation (the last tie-break).
        num_samples: samples of the group; they stay together.
        max_samples_per_engine: room of one engine, in samples.
    """
    candidates = [load for load in loads if load.state is EngineState.SERVING]
    if not candidates:
        candidates = [load for load in loads if load.state in READY_STATES]
    if not candidates:
        return RouteDecision(outcome=RouteOutcome.WAIT_FOR_ENGINE)
    with_room = [
        load
        for load in candidates
        if load.num_reserved == 0 or load.num_reserved + num_samples <= max_samples_per_engine
    ]
    if not with_room:
        return RouteDecision(outcome=RouteOutcome.WAIT_FOR_ROOM)
    best = min(with_room, key=lambda load: (load.num_reserved, load.kv_cache_usage))
    return RouteDecision(outcome=RouteOutcome.PLACE, engine_id=best.engine_id)
