"""The time in which an engine stands still for a push, and the pauses of an operator beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from shared.schemas.weights import EngineCommitTimings
from shared.types import PauseMode


class CommitWindow:
    """Pauses an engine core once, and adds up the seconds until it resumes.

    One pause, one or more loads, one resume. An operator's pause outlives it, and one that comes
    meanwhile begins when it ends.
    """

    def __init__(self) -> None:
        self._operator_mode: PauseMode | None = None
        self._closed = asyncio.Event()
        self._closed.set()
        self._asked_s: float | None = None
        """When the pause was asked for; None while the engine runs."""
        self._pause_s = 0.0
        self._load_s = 0.0

    @property
    def is_open(self) -> bool:
        """From the pause to the resume."""
        return self._asked_s is not None

    async def pause(self, core: Any, mode: PauseMode, recompute_kv: bool) -> None:
        """Stop generating between two steps; does nothing inside a window.

        Args:
            core: ``AsyncLLM.engine_core`` (vLLM 0.32.0: ``pause_scheduler_async``, whose
                ``clear_cache`` preempts every running request).
        """
        if self._asked_s is not None:
            return
        self._closed.clear()
        self._asked_s = time.perf_counter()
        self._load_s = 0.0
        await core.pause_scheduler_async(mode=mode.value, clear_cache=recompute_kv)
        self._pause_s = time.perf_counter() - self._asked_s

    def add_load(self, rank_seconds: Sequence[float]) -> None:
        """Count what a load took in each rank."""
        self._load_s += max(rank_seconds)

    async def pause_by_operator(self, core: Any, mode: PauseMode) -> None:
        """Stop generating until ``resume_by_operator``, between two steps; under ``wait`` when all
        that runs has finished, however many pushes come meanwhile."""
        self._operator_mode = mode
        if mode is PauseMode.KEEP and self._asked_s is not None:
            return  # it stands still already, and ``resume`` leaves it so
        while True:
            await self._closed.wait()
            if self._operator_mode is not mode:
                return  # resumed meanwhile, or paused in another way
            await core.pause_scheduler_async(mode=mode.value, clear_cache=False)
            if self._asked_s is None:
                return
            # A push froze what was waited for: the wait goes on, and the running, when that ends.

    async def resume_by_operator(self, core: Any) -> None:
        """End the operator's pause (vLLM 0.32.0: ``resume_scheduler_async``)."""
        self._operator_mode = None
        if self._asked_s is None:
            await core.resume_scheduler_async()

    async def resume(self, core: Any, engine_id: str) -> EngineCommitTimings:
        """End the window; generation goes on unless an operator has paused it."""
        assert self._asked_s is not None, "an engine resumes after it has loaded"
        started_s = time.perf_counter()
        if self._operator_mode is None:
            await core.resume_scheduler_async()
        finished_s = time.perf_counter()
        asked_s, self._asked_s = self._asked_s, None
        self._closed.set()
        return EngineCommitTimings(
            engine_id=engine_id,
            stage_s=0.0,
            pause_s=self._pause_s,
            load_s=self._load_s,
            requantize_s=0.0,
            resume_s=finished_s - started_s,
            paused_s=finished_s - asked_s,
        )
