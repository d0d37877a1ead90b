"""Tells an engine that is busy from one that is frozen, by what its processes do.

An engine that owes an answer may compute a long step, pack weights or wait for a disk; in a push's
pause it answers nothing, and all engines of the push wait for it. Its processes tell: one that is
stopped, or deadlocked, does nothing for as long as anybody looks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from shared.config.engine import EngineConfig
from shared.errors import EngineDeadError, EngineError

BUSY_SHARE = 0.01
"""Of the time. vLLM's processes use less while they wait for each other."""
ON_CPU_S = 3.0
"""Without ``engine.frozen_timeout_s``: whatever an engine does there takes processor time. Beside a
GPU processes may sleep while it computes, so they get as long as for a status."""
NUM_LOOKS = 4
"""After the first, in ``engine.frozen_timeout_s``. A host that was suspended has only lost one when
it goes on."""
BUSY_STATES = frozenset({psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP})
"""Computing, waiting for a processor or for memory; waiting for a disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Of vLLM's processes of one engine."""

    cpu_s: float
    """Since they started."""
    is_busy: bool
    """One of them is computing, or waits for a processor or a disk."""
    stopped: Mapping[int, float]
    """Those that are stopped (SIGSTOP): pid, and processor seconds."""


def activity_of(_actor: object) -> Activity:
    """Of everything below the calling process, the actor, which itself is not counted."""
    return activity_below(psutil.Process())


def activity_below(actor: psutil.Process) -> Activity:
    """The same of another process."""
    cpu_s = 0.0
    is_busy = False
    stopped = {}
    for process in actor.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            status = process.status()
            is_busy |= status in BUSY_STATES
            if status == psutil.STATUS_STOPPED:
                stopped[process.pid] = times.user + times.system
    return Activity(cpu_s=cpu_s, is_busy=is_busy, stopped=stopped)


def stood_still(looks: Sequence[Activity], duration_s: float) -> bool:
    """Whether nothing was done from the first look to the last, or one process was stopped all the
    time (pure).

    Args:
        duration_s: from the first to the last.
    """
    for pid, cpu_s in looks[0].stopped.items():
        if all(look.stopped.get(pid) == cpu_s for look in looks):
            return True  # whatever the others do: some spin while they wait for it
    if any(look.is_busy for look in looks):
        return False
    return looks[-1].cpu_s - looks[0].cpu_s < BUSY_SHARE * duration_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StandstillLimits:
    """Settings of ``engine``."""

    frozen_timeout_s: float
    answer_timeout_s: float
    """``engine.status_timeout_s``: of each look."""
    max_unanswered: int | None
    """``engine.max_status_timeouts``: so many looks in a row without an answer; None: any."""

    @classmethod
    def of(cls, engine: EngineConfig, device: str) -> StandstillLimits:
        """From the configuration; ``device`` is what the engine computes on, never ``auto``."""
        on_cuda_s = engine.status_timeout_s * engine.max_status_timeouts
        default_s = ON_CPU_S if device == "cpu" else on_cuda_s
        return cls(
            frozen_timeout_s=engine.frozen_timeout_s or default_s,
            answer_timeout_s=engine.status_timeout_s,
            max_unanswered=engine.max_status_timeouts,
        )


async def until_standstill(
    look: Callable[[], Awaitable[Activity]], limits: StandstillLimits
) -> str:
    """Watch until the engine stands still; the reason to give it up, in words. Else for ever.

    The first look is after an interval: what is done by then is not disturbed by any.

    Args:
        look: raises ``EngineError`` where there is no answer.

    Raises:
        EngineDeadError: it was given up otherwise.
    """
    interval_s = limits.frozen_timeout_s / NUM_LOOKS
    looks: deque[Activity] = deque(maxlen=NUM_LOOKS + 1)
    num_unanswered = 0
    while limits.max_unanswered is None or num_unanswered < limits.max_unanswered:
        await asyncio.sleep(interval_s)
        try:
            async with asyncio.timeout(limits.answer_timeout_s):
                looks.append(await look())
        except EngineDeadError:
            raise
        except (EngineError, TimeoutError):
            # The actor itself is stopped, or too busy: its processes are not known to be still.
            num_unanswered += 1
            looks.clear()
            continue
        num_unanswered = 0
        if len(looks) > NUM_LOOKS and stood_still(looks, limits.frozen_timeout_s):
            return (
                f"none of its processes did anything for {limits.frozen_timeout_s:g} s "
                "(engine.frozen_timeout_s)"
            )
    return (
        f"it did not tell what its processes do within {limits.answer_timeout_s:g} s "
        f"(engine.status_timeout_s) {num_unanswered} times in a row (engine.max_status_timeouts)"
    )
