"""Busy loading, or frozen: told by what an engine's processes do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from rollout_server.engine.actor_calls import ActorCalls
from rollout_server.engine.standstill import (
    NUM_LOOKS,
    Activity,
    StandstillLimits,
    activity_below,
    activity_of,
    stood_still,
    until_standstill,
)
from shared.config.engine import EngineConfig
from shared.errors import EngineDeadError, EngineError, WeightCommitError
from shared.types import EngineState

LIMITS = StandstillLimits(frozen_timeout_s=0.04, answer_timeout_s=0.02, max_unanswered=3)
LONG_S = 5.0


def seen(cpu_s: float, *, is_busy: bool = False, stopped: Any = None) -> Activity:
    return Activity(cpu_s=cpu_s, is_busy=is_busy, stopped=stopped or {})


def spins(cpu_s: float, stopped_cpu_s: float) -> Activity:
    """Process 1 is stopped, and another spins while it waits for it."""
    return seen(cpu_s, is_busy=True, stopped={1: stopped_cpu_s})


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([seen(1.0), seen(1.0), seen(1.0)], True),
        ([seen(1.0), seen(1.0), seen(1.03)], True),  # looks after each other now and then
        ([seen(1.0), seen(1.02), seen(1.04)], False),  # it adds up
        ([seen(1.0), seen(1.0, is_busy=True), seen(1.0)], False),
        ([seen(2.0), seen(2.0), seen(1.0)], True),  # one of them is gone
        ([spins(1.0, 0.5), spins(3.0, 0.5), spins(5.0, 0.5)], True),
        ([spins(1.0, 0.5), seen(3.0, is_busy=True), spins(5.0, 0.5)], False),  # for a moment
        ([spins(1.0, 0.5), spins(3.0, 0.6), spins(5.0, 0.6)], False),  # again and again
    ],
)
def test_who_does_nothing_is_still(looks: list[Activity], expected: bool) -> None:
    assert stood_still(looks, 4.0) is expected


@pytest.mark.parametrize(
    ("settings", "device", "expected_s"),
    [
        ({}, "cpu", 3.0),
        ({}, "cuda", 24.0),
        ({"status_timeout_s": 5.0, "max_status_timeouts": 2}, "cuda", 10.0),
        ({"frozen_timeout_s": 7.0}, "cpu", 7.0),
        ({"frozen_timeout_s": 7.0}, "cuda", 7.0),
    ],
)
def test_processes_may_sleep_for_longer_beside_a_gpu(
    settings: dict[str, Any], device: str, expected_s: float
) -> None:
    limits = StandstillLimits.of(EngineConfig(**settings), device)
    assert limits.frozen_timeout_s == expected_s


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


async def test_nothing_has_to_be_done_for_as_long_as_the_limit_says() -> None:
    still = [seen(1)] * NUM_LOOKS
    again = [seen(2)] * NUM_LOOKS
    looks = Looks(*still, *again, seen(2, is_busy=True), *again, None, *again, seen(2), seen(9))
    async with asyncio.timeout(LONG_S):
        reason = await until_standstill(looks, LIMITS)
    assert looks.num_left == 1, "one look less was not enough, four times"
    assert "engine.frozen_timeout_s" in reason


async def test_an_actor_that_does_not_answer_has_longer() -> None:
    """What its processes do nobody knows."""

    async def look() -> Activity:
        await asyncio.sleep(LONG_S)
        raise AssertionError("nobody waits for so long")

    async with asyncio.timeout(LONG_S):
        reason = await until_standstill(look, LIMITS)
    assert "3 times in a row (engine.max_status_timeouts)" in reason


async def test_a_watch_without_a_limit_for_it_waits_for_the_actor() -> None:
    looks = Looks(*[None] * 10, *[seen(1)] * NUM_LOOKS, seen(1), seen(9))
    async with asyncio.timeout(LONG_S):
        reason = await until_standstill(looks, replace(LIMITS, max_unanswered=None))
    assert "engine.frozen_timeout_s" in reason
    assert looks.num_left == 1


async def test_an_actor_that_answers_in_between_has_longer_still() -> None:
    looks = Looks(None, None, seen(1), None, None, seen(2), None, None, None, seen(3))
    async with asyncio.timeout(LONG_S):
        assert "3 times in a row" in await until_standstill(looks, LIMITS)
    assert looks.num_left == 1


async def test_the_watch_of_an_engine_that_is_dead_ends() -> None:
    async def look() -> Activity:
        raise EngineDeadError("engine-3 is dead")

    async with asyncio.timeout(LONG_S):
        with pytest.raises(EngineDeadError):
            await until_standstill(look, LIMITS)


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
    assert activity_below(parent).is_busy
    (child,) = parent.children()
    child.suspend()
    await cpu_s_after(0.1)
    assert await cpu_s_after(0.3) == 0
    assert not activity_below(parent).is_busy
    assert activity_below(parent).stopped.keys() == {child.pid}
    child.resume()
    await until_it_computes()


def test_what_an_actor_says_of_itself_is_of_its_children(parent: psutil.Process) -> None:
    deadline_s = time.monotonic() + LONG_S
    while activity_of(None).cpu_s == 0 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert activity_of(None).cpu_s > 0
