"""Pure routing decisions over frozen records of engine load. No clock, no I/O.

Load is counted in tokens that were asked for and may still come (prompt + ``max_tokens`` of every
sample): eight samples of 16k tokens are more work than thirty of 256. Example, with room for 8
samples per engine and a group of 4 to place::

    a SERVING 6 reserved, b SERVING 3 reserved  -> b   (a has no room for 4, b has)
    a SERVING 2 reserved, 9000 tokens, b SERVING 4 reserved, 2000 tokens  -> b
    a SERVING 6 reserved, b SERVING 7 reserved  -> wait for room
    a SYNCING 0 reserved, b SERVING 7 reserved  -> wait for room on b: a would only hold it up
    a SYNCING 0 reserved, b DEAD                -> a   (it goes on by itself after the commit)
    a STARTING, b DEAD                          -> wait for an engine
    a SERVING 0 reserved, not admitted, b SERVING 6 reserved   -> wait for room on b
    a SERVING not admitted, b the same, which failed later     -> a

An engine is not admitted while its circuit is open (``circuit_breaker.py``): what it was given
lately has failed. Where that is so of every engine, the one whose failure is longest ago is tried:
a request that is refused has failed for sure, while the breaker only guesses, and when all engines
fail at one time the requests may be the reason, which must not shut the server off.

A session goes back to the engine of its last turn, which has the conversation in its prefix cache,
unless that would cost more waiting than prefill (``keeps_session``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.types import EngineState

READY_STATES = frozenset({EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING})
"""States in which an engine takes requests, at once or after a resume."""


KV_FULL = 0.95
"""Above this an engine soon preempts: what it is given waits, or makes others wait."""
SESSION_SPILL_FACTOR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a group needs."""

    num_samples: int
    num_tokens: int
    """At the most, prompt included, over all samples."""
    session_engine_id: str | None = None
    """Where the last turn of its session ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """What routing knows of one engine."""

    engine_id: str
    state: EngineState
    num_reserved: int
    """Samples handed to the engine and not yet had back."""
    num_reserved_tokens: int
    """What those may still come to, prompts included."""
    kv_cache_usage: float
    """Fraction 0..1, as of the last status poll; full engines come last, and it breaks ties."""
    is_admitted: bool = True
    """False while its circuit is open, or its one probe is out."""
    last_failed_s: float = float("-inf")
    """When a group last failed on it; of any clock."""


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
    loads: Sequence[EngineLoad], demand: Demand, max_samples_per_engine: int
) -> RouteDecision:
    """Pick the engine with the fewest reserved tokens that has room for the whole group.

    Only when no engine is SERVING may a PAUSED or SYNCING one be queued to. A group larger than
    ``max_samples_per_engine`` goes to an engine that holds nothing else, or it could never run.

    Args:
        loads: every engine, in order of creation (the last tie-break).
        demand: of one group; its samples stay together, since they share their prompt's KV.
        max_samples_per_engine: room of one engine, in samples.
    """
    candidates = [load for load in loads if load.state is EngineState.SERVING]
    if not candidates:
        candidates = [load for load in loads if load.state in READY_STATES]
    if not candidates:
        return RouteDecision(outcome=RouteOutcome.WAIT_FOR_ENGINE)
    admitted = [load for load in candidates if load.is_admitted]
    with_room = [
        load
        for load in admitted or candidates
        if load.num_reserved == 0
        or load.num_reserved + demand.num_samples <= max_samples_per_engine
    ]
    if not with_room:
        return RouteDecision(outcome=RouteOutcome.WAIT_FOR_ROOM)
    if not admitted:
        longest_ago = min(with_room, key=lambda load: load.last_failed_s)
        return RouteDecision(outcome=RouteOutcome.PLACE, engine_id=longest_ago.engine_id)
    lightest = min(
        with_room,
        key=lambda load: (
            load.kv_cache_usage >= KV_FULL,
            load.num_reserved_tokens,
            load.kv_cache_usage,
        ),
    )
    for load in with_room:
        if load.engine_id == demand.session_engine_id and keeps_session(load, lightest, demand):
            return RouteDecision(outcome=RouteOutcome.PLACE, engine_id=load.engine_id)
    return RouteDecision(outcome=RouteOutcome.PLACE, engine_id=lightest.engine_id)


def choose_relief(
    loads: Sequence[EngineLoad], own_engine_id: str, demand: Demand, max_samples_per_engine: int
) -> str | None:
    """The engine that late samples of ``own_engine_id`` are handed over to; None to leave them.

    It has to serve, to have KV to spare, and to hold at most half of the samples: with less between
    them the samples would pay a prefill for a place that is as crowded.
    """
    num_own = sum(load.num_reserved for load in loads if load.engine_id == own_engine_id)
    lighter = [
        load
        for load in loads
        if load.engine_id != own_engine_id
        and load.state is EngineState.SERVING
        and load.is_admitted
        and load.kv_cache_usage < KV_FULL
        and 2 * load.num_reserved <= num_own
    ]
    return choose_engine(lighter, demand, max_samples_per_engine).engine_id


def keeps_session(own: EngineLoad, lightest: EngineLoad, demand: Demand) -> bool:
    """Whether a session's next turn stays: its engine is not full, and holds at most twice what the
    lightest does, not counting as much as this turn itself."""
    allowed = SESSION_SPILL_FACTOR * lightest.num_reserved_tokens + demand.num_tokens
    return own.kv_cache_usage < KV_FULL and own.num_reserved_tokens <= allowed
