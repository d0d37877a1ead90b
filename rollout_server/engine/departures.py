"""Engines on their way out: drained, then stopped, and nothing of them left behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from rollout_server.engine.footprint_store import FootprintStore
from rollout_server.engine.pooled_engine import PooledEngine
from shared.errors import EngineDeadError, SlipstreamError

LOGGER = logging.getLogger(__name__)


class Departures:
    """Of all pools. Nobody replaces an engine for being in here."""

    def __init__(self, footprints: FootprintStore) -> None:
        self._footprints = footprints
        self._leaving: set[str] = set()
        self._ending: set[PooledEngine] = set()

    @property
    def ending(self) -> frozenset[PooledEngine]:
        """Engines that are being stopped: no longer to be used, still to be got rid of."""
        return frozenset(self._ending)

    def is_leaving(self, engine_id: str) -> bool:
        """Whether it is drained; when it goes then, it is not lost."""
        return engine_id in self._leaving

    async def until_idle(self, handle: PooledEngine, within_s: float, poll_s: float) -> None:
        """Wait for the last request of a drained engine, at most ``within_s``; ``left`` follows."""
        self._leaving.add(handle.engine_id)
        deadline = asyncio.get_running_loop().time() + within_s
        while (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    status = await handle.status()
            except (EngineDeadError, TimeoutError):
                break
            except SlipstreamError as exc:  # one slow answer does not make it idle
                LOGGER.warning("engine %s drains: %s", handle.engine_id, exc.message)
            else:
                if status.num_running_reqs + status.num_waiting_reqs == 0:
                    break
            await asyncio.sleep(poll_s)

    def left(self, engine_id: str) -> None:
        """It is drained, and being stopped."""
        self._leaving.discard(engine_id)

    def stop(self, handle: PooledEngine, reason: str) -> Awaitable[None]:
        """To be awaited; from the call on it is ``ending``."""
        self._ending.add(handle)
        return self._stop_and_forget(handle, reason)

    async def _stop_and_forget(self, handle: PooledEngine, reason: str) -> None:
        await handle.stop(reason)
        self._footprints.forget(handle.engine_id)
        self._ending.discard(handle)
