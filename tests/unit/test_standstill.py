"""Busy loading, or frozen: told by what an engine's processes do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from rollout_server.engine.actor_calls import ActorCalls
from rollout_server.engine.standstill import (
    Activity,
    StandstillLimits,
    activity_below,
    activity_of,
    is_still,
    until_standstill,
)
from shared.errors import EngineError, WeightCommitError
from shared.types import EngineState

LIMITS = StandstillLimits(interval_s=0.01, max_still=3)
LONG_S = 5.0


def seen(cpu_s: float, *, waits_for_disk: bool = False) -> Activity:
    return Activity(cpu_s=cpu_s, waits_for_disk=waits_for_disk)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (seen(1.0), seen(1.5), False),
        (seen(1.0), seen(1.0), True),
        (seen(1.0), seen(1.005), True),  # looks after each other now and then
        (seen(1.0), seen(1.0, waits_for_disk=True), False),
        (None, seen(1.0), False),  # the first look, or the first answer after none
        (seen(1.0), None, True),
        (None, None, True),
        (seen(2.0), seen(1.0), True),  # one of them is gone
    ],
)
def test_who_does_nothing_is_still(
    before: Activity | None, now: Activity | None, expected: bool
) -> None:
    assert is_still(before, now, 1.0) is expected


class Looks:
    """One after the other; the last again and again."""

    def __init__(self, *looks: Activity | None) -> None:
        self._looks = list(looks)
        self.num_left = len(looks)

    async def __call__(self) -> Activity:
        look = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        self.num_left = len(self._looks)
        if look is None:
            raise EngineError("took longer than 30 s to look at itself")
        return look


async def test_so_many_looks_in_a_row_and_not_one_less() -> None:
    looks = Looks(seen(1), seen(1), seen(1), seen(2), seen(2), None, seen(3), seen(3), seen(3))
    async with asyncio.timeout(LONG_S):
        reason = await until_standstill(looks, LIMITS)
    assert looks.num_left == 1, "two in a row were not enough, three times"
    assert "3 times in a row" in reason


async def test_an_actor_that_does_not_answer_in_time_stands_still_too() -> None:
    async def look() -> Activity:
        await asyncio.sleep(LONG_S)
        raise AssertionError("nobody waits for so long")

    async with asyncio.timeout(LONG_S):
        assert "3 times in a row" in await until_standstill(look, LIMITS)


async def never() -> Any:
    await asyncio.Event().wait()


async def soon(value: str) -> str:
    await asyncio.sleep(0.05)
    return value


async def test_an_engine_that_stands_still_is_given_up_in_the_middle_of_a_call() -> None:
    calls = ActorCalls("engine-3")
    watch = until_standstill(Looks(seen(1)), LIMITS)
    with pytest.raises(WeightCommitError, match="engine-3 is dead: none of its processes did"):
        await asyncio.wait_for(calls.call_or_die(never(), "to load", 60.0, watch), LONG_S)
    assert calls.lifecycle.state is EngineState.DEAD


async def test_one_that_is_busy_is_left_alone_and_not_watched_any_longer() -> None:
    calls = ActorCalls("engine-3")
    watch = until_standstill(Looks(*[seen(n) for n in range(1000)]), LIMITS)
    assert await calls.call_or_die(soon("loaded"), "to load", 60.0, watch) == "loaded"
    assert calls.lifecycle.state is not EngineState.DEAD
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_call_that_takes_too_long_ends_the_engine_whatever_it_does() -> None:
    calls = ActorCalls("engine-3")
    watch = until_standstill(Looks(*[seen(n) for n in range(1000)]), LIMITS)
    with pytest.raises(WeightCommitError, match=r"longer than 0.05 s to load"):
        await calls.call_or_die(never(), "to load", 0.05, watch)
    assert calls.lifecycle.state is EngineState.DEAD


@pytest.fixture
def parent() -> Iterator[psutil.Process]:
    """A process of ours with a child that computes. Not this one: engines of other tests may be
    below it."""
    busy = f"{sys.executable} -c 'while True: pass'"
    process = subprocess.Popen(["sh", "-c", f"{busy} & wait"], start_new_session=True)
    yield psutil.Process(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def test_a_stopped_process_does_nothing(parent: psutil.Process) -> None:
    async def cpu_s_after(seconds: float) -> float:
        before = activity_below(parent)
        await asyncio.sleep(seconds)
        return activity_below(parent).cpu_s - before.cpu_s

    async def until_it_computes() -> None:
        async with asyncio.timeout(LONG_S):
            while await cpu_s_after(0.1) == 0:
                pass

    await until_it_computes()
    (child,) = parent.children()
    child.suspend()
    await cpu_s_after(0.1)
    assert await cpu_s_after(0.3) == 0
    child.resume()
    await until_it_computes()


def test_what_an_actor_says_of_itself_is_of_its_children(parent: psutil.Process) -> None:
    deadline_s = time.monotonic() + LONG_S
    while activity_of(None).cpu_s == 0 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert activity_of(None).cpu_s > 0
