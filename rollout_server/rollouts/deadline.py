"""Ends what is unfinished when a request's time is up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

LOGGER = logging.getLogger(__name__)

ABORT_REPEAT_S = 0.5
"""A group may have been on its way to an engine when it was to end."""


@asynccontextmanager
async def ended_after(
    deadline_s: float | None, abort: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Call ``abort`` again and again from ``deadline_s`` on, until the body has ended."""
    if deadline_s is None:
        yield
        return
    waiting = asyncio.create_task(_abort_later(deadline_s, abort))
    try:
        yield
    finally:
        waiting.cancel()


async def _abort_later(deadline_s: float, abort: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(deadline_s)
    LOGGER.info("deadline_s %g has passed", deadline_s)
    while True:
        await abort()
        await asyncio.sleep(ABORT_REPEAT_S)
