"""Collects vLLM's metrics from the engines at scrape time, without ever waiting long for one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import monotonic

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.engine.vllm_metrics import MetricText, joined
from rollout_server.status_poller import SILENT_STATES
from shared.errors import EngineError

LOGGER = logging.getLogger(__name__)

FRESH_S = 0.5
"""Several scrapers at once, or a hasty one, share one question to an engine."""


class EngineScraper:
    """The last metrics of every engine. At most one question per engine is under way."""

    def __init__(
        self, pool: EnginePool, *, timeout_s: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._clock = clock
        self._last: dict[str, tuple[float, tuple[MetricText, ...]]] = {}  # when, what
        self._asks: dict[str, asyncio.Task[None]] = {}

    async def refresh(self) -> None:
        """Ask every engine and wait up to ``server.engine_metrics_timeout_s`` for all together.

        An answer that comes later is there for the next scrape.
        """
        engines = {engine.engine_id: engine for engine in self._pool.engines()}
        self._last = {name: last for name, last in self._last.items() if name in engines}
        self._asks = {name: task for name, task in self._asks.items() if not task.done()}
        now_s = self._clock()
        for engine_id, engine in engines.items():
            asked_s = self._last[engine_id][0] if engine_id in self._last else None
            is_fresh = asked_s is not None and now_s - asked_s < FRESH_S
            if engine.state not in SILENT_STATES and engine_id not in self._asks and not is_fresh:
                self._asks[engine_id] = asyncio.create_task(
                    self._ask(engine), name=f"metrics {engine_id}"
                )
        if self._asks:
            await asyncio.wait(self._asks.values(), timeout=self._timeout_s)

    def ages_s(self) -> Mapping[str, float]:
        """How old the figures of each engine are."""
        now_s = self._clock()
        return {name: now_s - received_s for name, (received_s, _) in self._last.items()}

    def render(self) -> str:
        """The last answers, as Prometheus text."""
        return joined(families for _, families in self._last.values())

    async def close(self) -> None:
        """Stop asking. Idempotent."""
        tasks = [*self._asks.values()]
        self._asks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, engine: EngineHandle) -> None:
        try:
            families = await engine.vllm_metrics()
        except EngineError as exc:
            # Busy or gone: its last figures stand, and their age says so.
            LOGGER.warning("metrics of engine %s failed: %s", engine.engine_id, exc.message)
        else:
            self._last[engine.engine_id] = (self._clock(), families)
