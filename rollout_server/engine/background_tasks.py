"""Work of the pool that nobody waits for, kept until it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

LOGGER = logging.getLogger(__name__)


class BackgroundTasks:
    """An error ends its own task only, and is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Awaitable[None]) -> None:
        """Begin it now."""

        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    async def cancel(self) -> None:
        """End what runs, and wait for it."""
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            LOGGER.error("engine pool task failed", exc_info=task.exception())
