"""An engine whose core dies while nothing runs is found dead by whoever asks it anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from rollout_server.engine.footprint import OPENMP_FILE, SHARED_MEMORY
from shared.errors import EngineDeadError
from tests.support.engine import running_engine
from tests.support.models import make_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]


async def test_its_status_says_so(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", seed=8)
    # The engines that other tests share live in this process too: theirs are not to be killed.
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    async with running_engine(path, drafter={"enabled": False}) as actor:
        assert (await actor.load())["num_running_reqs"] == 0
        core = next(
            child
            for child in psutil.Process().children(recursive=True)
            if child.pid not in before and "EngineCore" in " ".join(child.cmdline())
        )
        killed = [core.pid, *(child.pid for child in core.children(recursive=True))]
        core.kill()

        async def until_dead() -> None:
            while not actor._llm.errored:  # noqa: ASYNC110 - vLLM has no event for it
                await asyncio.sleep(0.05)

        await asyncio.wait_for(until_dead(), 30)
        for question in (actor.load, actor.stage_initial):
            with pytest.raises(EngineDeadError, match="test-engine"):
                await question()
    for pid in killed:  # as the pool does, of processes that were killed: OpenMP's file
        for left in SHARED_MEMORY.glob(OPENMP_FILE.format(pid=pid)):
            left.unlink()
