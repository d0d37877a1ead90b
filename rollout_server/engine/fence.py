"""Once an engine is given up, nothing it still answers counts.

Every engine started has an id of its own, and a handle of its own with one fence: the pair is the
engine's epoch. Whoever waits for an answer of an engine that is given up hears so at once, instead
of waiting for a process that may hang; and an answer that is on its way by then is dropped, or it
could be delivered beside the one of the engine that took the work over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


class FencedOffError(Exception):
    """The engine was given up before, or while, its answer was waited for."""


class Fence:
    """Belongs to one engine, and closes once."""

    def __init__(self) -> None:
        self._is_closed = False
        self._closing: asyncio.Future[None] | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """Drop whatever comes from now on. Idempotent."""
        self._is_closed = True
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    async def answer(self, call: Awaitable[Any], timeout_s: float) -> Any:
        """What ``call`` returns or raises, unless the fence is closed by then.

        Raises:
            FencedOffError: it is.
            TimeoutError: ``call`` took longer than ``timeout_s``.
        """
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
            if self._is_closed:
                self._closing.set_result(None)
        task = asyncio.ensure_future(_awaited(call))
        try:
            await asyncio.wait(
                {task, self._closing}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if self._is_closed:
                raise FencedOffError
            if not task.done():
                raise TimeoutError
            return task.result()
        finally:
            task.cancel()
            # Nobody may ask for the error of a call that was dropped.
            task.add_done_callback(_look_at_error)


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


def _look_at_error(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
