"""The rebuild of an engine's drafter, behind the push that it belongs to.

An engine that has resumed serves the new version, and the push is done. Its drafter follows,
between the steps of what runs; until then nothing is drafted, which costs time and never a token.
What needs the drafter whole, or must not meet its rebuild, waits for it: the next stage and load,
and an audit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from rollout_server.engine.drafter_state import RebuiltDrafter


class BackgroundRebuild:
    """Of one engine; one rebuild at a time."""

    def __init__(self) -> None:
        self._last = RebuiltDrafter(version=0, requantize_s=0.0)
        self._task: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """Of the drafter that is whole, or was before the rebuild that is under way."""
        return self._last.version

    @property
    def requantize_s(self) -> float | None:
        """Of the last rebuild; None while one is under way, and where it failed."""
        is_over = self._task is None
        return self._last.requantize_s if is_over else None

    def begin(self, rebuild: Coroutine[Any, Any, RebuiltDrafter]) -> None:
        """
        Args:
            rebuild: whose failure is the engine's end, by itself.
        """
        assert self._task is None, "the last one was not waited for"
        self._task = asyncio.create_task(self._run(rebuild), name="drafter-rebuild")
        self._task.add_done_callback(_look_at_error)

    async def ended(self) -> None:
        """Wait for it, if it is under way, whatever comes of it."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _run(self, rebuild: Coroutine[Any, Any, RebuiltDrafter]) -> None:
        self._last = await rebuild
        self._task = None


def _look_at_error(task: asyncio.Task[None]) -> None:
    """The engine says what its end was; asyncio need not say it again."""
    if not task.cancelled():
        task.exception()
