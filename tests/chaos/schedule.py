"""Who is killed in a run of ``make chaos``, and in the middle of what (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from enum import StrEnum


class Victim(StrEnum):
    """What is done to which process."""

    ENGINE = "engine"
    ENGINE_CORE = "engine core"
    FROZEN_ENGINE_CORE = "frozen engine core"
    """SIGSTOP, for good: it has to be found by what it does not do."""
    HALTED_ENGINE_CORE = "halted engine core"
    """SIGSTOP, and SIGCONT soon after: nobody may replace it."""
    SLOW_ENGINE_CORE = "slow engine core"
    """Stopped half of the time for a while: nobody may replace it."""
    SCORING_WORKER = "scoring worker"
    TRAINER = "trainer"
    """The process that pushes."""
    SERVER = "server"
    RAYLET = "raylet"
    """Of a worker node, with the engine on it; needs a cluster of several nodes."""


class Moment(StrEnum):
    """What the service is doing, beside generating and scoring all the time."""

    GENERATING = "generating"
    PUSHING = "pushing"
    SCALING = "scaling"
    """A change of the number of engines has just been asked for: one up, next time one down."""
    DRAINING = "draining"
    """An engine drains and is replaced; every other time it is that one that is hit."""


KILLED_ENGINES = frozenset({Victim.ENGINE, Victim.ENGINE_CORE, Victim.RAYLET})
LOST_ENGINES = KILLED_ENGINES | {Victim.FROZEN_ENGINE_CORE}
SPARED_ENGINES = frozenset({Victim.HALTED_ENGINE_CORE, Victim.SLOW_ENGINE_CORE})
MOMENTS: dict[Victim, tuple[Moment, ...]] = {
    Victim.TRAINER: (Moment.PUSHING,),
    Victim.HALTED_ENGINE_CORE: (Moment.GENERATING, Moment.PUSHING),
    Victim.SLOW_ENGINE_CORE: (Moment.GENERATING, Moment.PUSHING),
    Victim.RAYLET: (Moment.GENERATING, Moment.PUSHING),
}
"""All, where a victim is not named."""
LOCAL_VICTIMS = tuple(victim for victim in Victim if victim is not Victim.RAYLET)


def schedule(victims: Sequence[Victim]) -> Iterator[tuple[Victim, Moment]]:
    """Victims in turn, each with its moments in turn, without end."""
    moments = {victim: itertools.cycle(MOMENTS.get(victim, tuple(Moment))) for victim in victims}
    # Else all victims would meet with the same moment in the same round.
    for shift, victim in enumerate(victims):
        for _ in range(shift % len(Moment)):
            next(moments[victim])
    for victim in itertools.cycle(victims):
        yield victim, next(moments[victim])
