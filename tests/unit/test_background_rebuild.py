"""A drafter follows its target behind the push; what needs it whole waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rollout_server.engine.background_rebuild import BackgroundRebuild
from rollout_server.engine.drafter_state import RebuiltDrafter
from rollout_server.engine.handle import RayEngineHandle
from shared.errors import EngineDeadError, WeightCommitError
from shared.schemas.weights import EngineCommitTimings
from shared.types import DrafterRebuild, EngineState
from tests.unit.test_fence import FakeActor, actor, handle

__all__ = ["actor", "handle"]  # fixtures

REBUILT = RebuiltDrafter(version=5, requantize_s=0.5)
TIMINGS = EngineCommitTimings(
    engine_id="engine-3",
    stage_s=0.0,
    pause_s=0.1,
    load_s=0.2,
    requantize_s=None,
    resume_s=0.1,
    paused_s=0.4,
)
ANY_MANIFEST: Any = None
"""The actor in memory does not look into it."""
LONG_S = 5.0


async def turns() -> None:
    """Let everything that can go on go on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def answered(call: Awaitable[Any], actor: FakeActor, name: str, answer: Any) -> Any:
    task = asyncio.ensure_future(call)
    await turns()
    actor.methods[name].answers[-1].set_result(answer)
    return await asyncio.wait_for(task, LONG_S)


async def pushed(handle: RayEngineHandle, actor: FakeActor) -> EngineCommitTimings:
    """Version 5, to the answer of ``resume``: the rebuild is not answered."""
    await answered(handle.load_weights(5), actor, "load_weights", None)
    timings: EngineCommitTimings = await answered(handle.resume(), actor, "resume", TIMINGS)
    await turns()
    return timings


async def test_an_engine_serves_while_its_drafter_follows(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    timings = await pushed(handle, actor)
    assert handle.state is EngineState.SERVING
    assert timings.requantize_s is None
    assert (handle.committed_version, handle.drafter.version) == (5, 0)
    assert handle.drafter.requantize_s is None
    actor.methods["rebuild_drafter"].answers[0].set_result(REBUILT)
    await turns()
    assert (handle.drafter.version, handle.drafter.requantize_s) == (5, 0.5)


async def resuming_in_the_pause(
    handle: RayEngineHandle, actor: FakeActor
) -> asyncio.Future[EngineCommitTimings]:
    """Version 5, to where only the rebuild is left to be answered."""
    drafter = handle.spec.drafter.model_copy(update={"rebuild": DrafterRebuild.IN_PAUSE})
    object.__setattr__(handle.spec, "drafter", drafter)
    await answered(handle.load_weights(5), actor, "load_weights", None)
    resuming = asyncio.ensure_future(handle.resume())
    await turns()
    actor.methods["resume"].answers[0].set_result(TIMINGS)
    await turns()
    return resuming


async def test_one_that_is_rebuilt_in_the_pause_is_waited_for(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    resuming = await resuming_in_the_pause(handle, actor)
    assert not resuming.done()
    actor.methods["rebuild_drafter"].answers[0].set_result(REBUILT)
    assert (await asyncio.wait_for(resuming, LONG_S)).requantize_s == 0.5


async def test_one_that_fails_in_the_pause_has_not_resumed(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    resuming = await resuming_in_the_pause(handle, actor)
    actor.methods["rebuild_drafter"].answers[0].set_exception(WeightCommitError("out of memory"))
    with pytest.raises(EngineDeadError, match="out of memory"):
        await asyncio.wait_for(resuming, LONG_S)


CALLS: dict[str, Callable[[RayEngineHandle], Awaitable[Any]]] = {
    "stage": lambda handle: handle.stage(6, "/weights", ANY_MANIFEST),
    "stage_initial": lambda handle: handle.stage_initial(),
    "load_weights": lambda handle: handle.load_weights(6),
    "audit": lambda handle: handle.audit("/weights"),
}


@pytest.mark.parametrize("name", CALLS)
async def test_what_would_meet_a_rebuild_waits_for_it(
    name: str, handle: RayEngineHandle, actor: FakeActor
) -> None:
    await pushed(handle, actor)
    num_before = len(actor.methods[name].answers) if name in actor.methods else 0
    call = asyncio.ensure_future(CALLS[name](handle))
    await turns()
    assert name not in actor.methods or len(actor.methods[name].answers) == num_before
    actor.methods["rebuild_drafter"].answers[0].set_result(REBUILT)
    await turns()
    assert len(actor.methods[name].answers) == num_before + 1
    handle.condemn("the test is over")
    with pytest.raises((EngineDeadError, WeightCommitError)):
        await call


async def test_a_rebuild_that_fails_is_the_engines_end_and_nobody_waits_any_more(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    await pushed(handle, actor)
    staging = asyncio.ensure_future(CALLS["stage"](handle))
    await turns()
    actor.methods["rebuild_drafter"].answers[0].set_exception(WeightCommitError("out of memory"))
    with pytest.raises(EngineDeadError, match="to rebuild its drafter"):
        await asyncio.wait_for(staging, LONG_S)
    assert handle.state is EngineState.DEAD
    assert "out of memory" in (handle.error or "")
    assert handle.drafter.requantize_s is None


async def test_an_engine_that_dies_meanwhile_ends_its_rebuild(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    await pushed(handle, actor)
    handle.condemn("its node went")
    audit = asyncio.ensure_future(handle.audit("/weights"))
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(audit, LONG_S)


async def test_who_stops_waiting_does_not_stop_the_rebuild() -> None:
    rebuild, may_end = BackgroundRebuild(), asyncio.Event()

    async def work() -> RebuiltDrafter:
        await may_end.wait()
        return REBUILT

    rebuild.begin(work())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await rebuild.ended()
    may_end.set()
    await asyncio.wait_for(rebuild.ended(), LONG_S)
    assert (rebuild.version, rebuild.requantize_s) == (5, 0.5)
    await rebuild.ended()
