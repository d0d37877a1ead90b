"""An operator's pause of one engine and the states it goes through."""

from __future__ import annotations

import asyncio

import pytest

from rollout_server.engine.lifecycle import EngineLifecycle
from rollout_server.engine.operator_pause import OperatorPause
from shared.errors import EngineError
from shared.types import EngineState


def serving() -> EngineLifecycle:
    lifecycle = EngineLifecycle()
    lifecycle.move(EngineState.SERVING)
    return lifecycle


async def test_a_pause_and_its_end_are_repeatable() -> None:
    lifecycle = serving()
    pause = OperatorPause("e", lifecycle, 1.0)
    for state in (EngineState.PAUSED, EngineState.PAUSED, EngineState.SERVING, EngineState.SERVING):
        await pause.change(state)
        assert lifecycle.state is state


async def test_an_engine_that_starts_serves_as_it_was_told_last() -> None:
    lifecycle = EngineLifecycle()
    pause = OperatorPause("e", lifecycle, 1.0)
    await pause.change(EngineState.PAUSED)
    assert (lifecycle.state, pause.serve_as) == (EngineState.STARTING, EngineState.PAUSED)
    await pause.change(EngineState.SERVING)
    assert pause.serve_as is EngineState.SERVING


@pytest.mark.parametrize("before", [EngineState.SERVING, EngineState.PAUSED])
async def test_a_push_is_waited_for(before: EngineState) -> None:
    lifecycle = serving()
    pause = OperatorPause("e", lifecycle, 60.0)
    await pause.change(before)
    lifecycle.move(EngineState.SYNCING)
    pausing = asyncio.create_task(pause.change(EngineState.PAUSED))
    await asyncio.sleep(0.1)
    assert lifecycle.state is EngineState.SYNCING
    lifecycle.move(before)
    await pausing
    assert lifecycle.state is EngineState.PAUSED


async def test_of_a_pause_and_a_resume_during_a_push_the_later_one_holds() -> None:
    for _ in range(10):
        lifecycle = serving()
        pause = OperatorPause("e", lifecycle, 60.0)
        lifecycle.move(EngineState.SYNCING)
        pausing = asyncio.create_task(pause.change(EngineState.PAUSED))
        await asyncio.sleep(0.001)
        resuming = asyncio.create_task(pause.change(EngineState.SERVING))
        await asyncio.sleep(0.03)
        lifecycle.move(EngineState.SERVING)
        assert await asyncio.gather(pausing, resuming) == [False, True]
        assert lifecycle.state is EngineState.SERVING


async def test_a_push_that_does_not_end_is_an_error_that_names_the_settings() -> None:
    lifecycle = serving()
    lifecycle.move(EngineState.SYNCING)
    with pytest.raises(EngineError, match=r"0\.01 s \(weights\.pause_timeout_s"):
        await OperatorPause("e", lifecycle, 0.01).change(EngineState.PAUSED)


@pytest.mark.parametrize("state", [EngineState.DRAINING, EngineState.DEAD])
async def test_engines_that_leave_are_left_alone(state: EngineState) -> None:
    lifecycle = serving()
    lifecycle.move(state)
    await OperatorPause("e", lifecycle, 1.0).change(EngineState.PAUSED)
    assert lifecycle.state is state
