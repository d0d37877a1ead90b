"""Pushes, audits and joining engines, strictly one after the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from shared.errors import UnavailableError


class Turns:
    """Waits for one's turn no longer than ``weights.lock_timeout_s``."""

    def __init__(self, lock_timeout_s: float) -> None:
        self._lock_timeout_s = lock_timeout_s
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def take(self, who: str, at_least_s: float = 0.0) -> AsyncIterator[None]:
        """Hold the turn during the body.

        Args:
            who: for the error.
            at_least_s: wait so long even where the setting is shorter.

        Raises:
            UnavailableError: others held it all the time.
        """
        limit_s = max(self._lock_timeout_s, at_least_s)
        try:
            async with asyncio.timeout(limit_s):
                await self._lock.acquire()
        except TimeoutError as exc:
            raise UnavailableError(
                f"{who} waited {limit_s:g} s for another weight push or audit "
                "(weights.lock_timeout_s)"
            ) from exc
        try:
            yield
        finally:
            self._lock.release()
