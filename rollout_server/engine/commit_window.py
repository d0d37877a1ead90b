"""The time in which an engine stands still for a push: one pause, one or more loads, one resume."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from shared.schemas.weights import EngineCommitTimings
from shared.types import PauseMode


class CommitWindow:
    """Pauses an engine core once, and adds up the seconds until it resumes."""

    def __init__(self) -> None:
        self._asked_s: float | None = None
        """When the pause was asked for; None while the engine runs."""
        self._pause_s = 0.0
        self._load_s = 0.0

    async def pause(self, core: Any, mode: PauseMode, recompute_kv: bool) -> None:
        """Stop generating between two steps; does nothing inside a window.

        Args:
            core: ``AsyncLLM.engine_core`` (vLLM 0.32.0: ``pause_scheduler_async``, whose
                ``clear_cache`` preempts every running request).
        """
        if self._asked_s is not None:
            return
        self._asked_s = time.perf_counter()
        self._load_s = 0.0
        await core.pause_scheduler_async(mode=mode.value, clear_cache=recompute_kv)
        self._pause_s = time.perf_counter() - self._asked_s

    def add_load(self, rank_seconds: Sequence[float]) -> None:
        """Count what a load took in each rank."""
        self._load_s += max(rank_seconds)

    async def resume(self, core: Any, engine_id: str, *, stay_paused: bool) -> EngineCommitTimings:
        """End the window.

        Args:
            stay_paused: an operator's pause was there before the push and outlives it.
        """
        assert self._asked_s is not None, "an engine resumes after it has loaded"
        started_s = time.perf_counter()
        if not stay_paused:
            await core.resume_scheduler_async()
        finished_s = time.perf_counter()
        asked_s, self._asked_s = self._asked_s, None
        return EngineCommitTimings(
            engine_id=engine_id,
            stage_s=0.0,
            pause_s=self._pause_s,
            load_s=self._load_s,
            requantize_s=0.0,
            resume_s=finished_s - started_s,
            paused_s=finished_s - asked_s,
        )
