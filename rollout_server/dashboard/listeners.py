"""Who listens to the feed: at most so many, each with a short queue of encoded events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from shared.errors import OverloadedError, UnavailableError

MAX_QUEUED_EVENTS = 8
"""A listener that falls further behind is let go; its page connects again and starts afresh."""


class Listener:
    """One open stream."""

    def __init__(self, first: bytes) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._queue.put_nowait(first)

    def offer(self, event: bytes) -> bool:
        """False when its queue is full."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            return False
        return True

    def end(self, last: bytes) -> None:
        """Nothing after ``last``."""
        while self._queue.qsize() > MAX_QUEUED_EVENTS - 2:
            self._queue.get_nowait()
        self._queue.put_nowait(last)
        self._queue.put_nowait(None)

    async def events(self) -> AsyncIterator[bytes]:
        """Until the end."""
        # Bounded: something comes at every tick of the feed, and the feed ends its listeners.
        while (event := await self._queue.get()) is not None:
            yield event


class Listeners:
    """All of them.

    Args:
        max_listeners: ``server.dashboard.max_listeners``.
    """

    def __init__(self, max_listeners: int) -> None:
        self._max_listeners = max_listeners
        self._listeners: set[Listener] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._listeners)

    def check_room(self) -> None:
        """
        Raises:
            OverloadedError: there are as many as may be.
            UnavailableError: the server is shutting down.
        """
        if self._closed:
            raise UnavailableError("no events any more: the server is shutting down")
        if len(self._listeners) >= self._max_listeners:
            raise OverloadedError(
                f"{len(self._listeners)} listeners are connected already, as many as "
                f"server.dashboard.max_listeners {self._max_listeners} allows"
            )

    def add(self, first: bytes) -> Listener:
        """One more, who gets ``first`` first. ``check_room`` comes before."""
        listener = Listener(first)
        self._listeners.add(listener)
        return listener

    def remove(self, listener: Listener) -> None:
        """It left. Safe to repeat."""
        self._listeners.discard(listener)

    def send(self, event: bytes, farewell: bytes) -> None:
        """To everyone; who cannot keep up gets ``farewell`` and no more."""
        for listener in tuple(self._listeners):
            if not listener.offer(event):
                listener.end(farewell)
                self._listeners.discard(listener)

    def close(self, farewell: bytes) -> None:
        """End all, and take no more. Idempotent."""
        self._closed = True
        for listener in tuple(self._listeners):
            listener.end(farewell)
        self._listeners.clear()
