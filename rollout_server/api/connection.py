"""Work that is only worth doing while its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rollout_server.api.errors import client_closed

ResultT = TypeVar("ResultT")


async def while_connected(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run ``work``, or cancel it when the client disconnects.

    Raises:
        HttpError: 499, which nobody will read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        # Bounded by the engines' own timeouts, which end ``work``.
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise client_closed()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.wait({task, watcher})


class AttendedStream(StreamingResponse):
    """A stream inside of ``attended``, which ends with it, or with the client: also if not a single
    piece has been asked for by then, where a generator's own ``finally`` would never run."""

    def __init__(
        self,
        pieces: AsyncIterable[bytes],
        media_type: str,
        attended: AbstractContextManager[None],
    ) -> None:
        super().__init__(pieces, media_type=media_type)
        self._attended = attended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._attended:
            await super().__call__(scope, receive, send)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
