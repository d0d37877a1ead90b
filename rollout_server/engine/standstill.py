"""Tells an engine that is busy loading weights from one that stands still for good.

In a push's pause an engine computes no tokens and answers no status, so that nothing it owes tells
whether it is alive; and all engines of the push wait for it. What its processes do tells: they load
or pack, or wait for a disk. If for as long as is too long for a status none of them has done
anything, it is frozen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil

from shared.config.engine import EngineConfig
from shared.errors import EngineError

BUSY_SHARE = 0.01
"""Of the time between two looks. vLLM's processes use less while they wait for each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Of vLLM's processes of one engine."""

    cpu_s: float
    """Since they started."""
    waits_for_disk: bool


def activity_of(_actor: object) -> Activity:
    """Of everything below the calling process, the actor, which itself is not counted."""
    return activity_below(psutil.Process())


def activity_below(actor: psutil.Process) -> Activity:
    """The same of another process."""
    cpu_s = 0.0
    waits_for_disk = False
    for process in actor.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            waits_for_disk |= process.status() == psutil.STATUS_DISK_SLEEP
    return Activity(cpu_s=cpu_s, waits_for_disk=waits_for_disk)


def is_still(before: Activity | None, now: Activity | None, interval_s: float) -> bool:
    """Whether nothing was done between two looks (pure).

    Args:
        before, now: None where there was no answer: the actor itself may be what stands still.
    """
    if now is None:
        return True
    if before is None:
        return False
    return not now.waits_for_disk and now.cpu_s - before.cpu_s < BUSY_SHARE * interval_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StandstillLimits:
    """Settings of ``engine``."""

    interval_s: float
    max_still: int
    """So many looks in a row at which nothing was done."""

    @classmethod
    def of(cls, engine: EngineConfig) -> StandstillLimits:
        """Those of the status that such an engine cannot answer."""
        return cls(interval_s=engine.status_timeout_s, max_still=engine.max_status_timeouts)


async def until_standstill(
    look: Callable[[], Awaitable[Activity]], limits: StandstillLimits
) -> str:
    """Watch until the engine stands still; the reason to give it up, in words. Else for ever.

    The first look is after an interval: a load that is done by then is not disturbed by any.

    Args:
        look: raises ``EngineError`` where there is no answer.
    """
    last: Activity | None = None
    num_still = 0
    while num_still < limits.max_still:
        await asyncio.sleep(limits.interval_s)
        now: Activity | None = None
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(limits.interval_s):
                now = await look()
        num_still = num_still + 1 if is_still(last, now, limits.interval_s) else 0
        last = now
    return (
        f"none of its processes did anything, {num_still} times in a row (engine."
        f"max_status_timeouts) for {limits.interval_s:g} s (engine.status_timeout_s)"
    )
