"""An operator's pause beside the pause of a push, over an engine core that notes its calls."""

from __future__ import annotations

import asyncio
from typing import Any

from rollout_server.engine.commit_window import CommitWindow
from shared.types import PauseMode
from tests.fakes.service import until


class NotedCore:
    """As vLLM 0.32.0: ``keep`` stops the steps, so that nothing runs and every wait is over."""

    def __init__(self) -> None:
        self.state = "running"
        self._over = asyncio.Event()

    def finish_all(self) -> None:
        self._over.set()

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        del clear_cache
        self.state = mode
        if mode == "wait":
            self._over.clear()
            await self._over.wait()
        self._over.set()  # of whoever waited: nothing runs any more

    async def resume_scheduler_async(self) -> None:
        self.state = "running"


async def push(window: CommitWindow, core: Any) -> None:
    await window.pause(core, PauseMode.KEEP, recompute_kv=False)
    assert core.state == "keep"
    await asyncio.sleep(0.01)
    await window.resume(core, "e")


async def test_a_push_ends_where_it_began() -> None:
    window, core = CommitWindow(), NotedCore()
    await push(window, core)
    assert core.state == "running"
    await window.pause_by_operator(core, PauseMode.KEEP)
    await push(window, core)
    assert core.state == "keep"
    await window.resume_by_operator(core)
    assert core.state == "running"


async def test_what_an_operator_waits_for_goes_on_after_a_push() -> None:
    window, core = CommitWindow(), NotedCore()
    pausing = asyncio.create_task(window.pause_by_operator(core, PauseMode.WAIT))
    await until(lambda: core.state == "wait", "the pause to begin")
    await push(window, core)
    await until(lambda: core.state == "wait", "it to run on")
    assert not pausing.done()
    core.finish_all()
    await pausing


async def test_an_operator_who_comes_during_a_push_is_heard_at_its_end() -> None:
    for mode in (PauseMode.KEEP, None):
        window, core = CommitWindow(), NotedCore()
        await window.pause(core, PauseMode.KEEP, recompute_kv=False)
        pausing = asyncio.create_task(window.pause_by_operator(core, PauseMode.KEEP))
        await asyncio.sleep(0)
        if mode is None:
            await window.resume_by_operator(core)
        assert core.state == "keep", "the push still stands"
        await window.resume(core, "e")
        assert core.state == ("running" if mode is None else "keep")
        await pausing
        assert core.state == ("running" if mode is None else "keep")
