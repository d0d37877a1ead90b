"""How far an engine has come over time, and how two runs of the same work compare."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rollout_server.engine.actor import EngineActor

POLL_S = 0.1
WINDOW_S = 30.0
Points = Sequence[tuple[float, int]]
"""Seconds since the start, tokens made until then."""


class Progress:
    """Watches how many tokens an engine has made."""

    def __init__(self, engine: EngineActor) -> None:
        self._engine = engine
        self.points: list[tuple[float, int]] = []
        self._looked = asyncio.Event()

    async def tokens(self) -> int:
        return int((await self._engine.load())["num_generation_tokens"])

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        started, first = time.perf_counter(), await self.tokens()

        async def poll() -> None:
            while True:
                made = await self.tokens() - first
                self.points.append((time.perf_counter() - started, made))
                self._looked.set()
                await asyncio.sleep(POLL_S)

        polling = asyncio.create_task(poll())
        try:
            yield
        finally:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling
            made = await self.tokens() - first
            self.points.append((time.perf_counter() - started, made))

    async def reached(self, num_tokens: int, timeout_s: float = 300.0) -> None:
        """Wait until this many tokens have been made."""
        async with asyncio.timeout(timeout_s):
            while not self.points or self.points[-1][1] < num_tokens:
                self._looked.clear()
                await self._looked.wait()


def seconds_at(run: Points, tokens: float) -> float:
    """When a run had made this many tokens, between two looks by proportion."""
    counts = [made for _, made in run]
    right = min(max(bisect_left(counts, tokens), 1), len(counts) - 1)
    (t0, n0), (t1, n1) = run[right - 1], run[right]
    return t0 if n1 == n0 else t0 + (t1 - t0) * min(max((tokens - n0) / (n1 - n0), 0.0), 1.0)


def tokens_at(run: Points, seconds: float) -> float:
    times = [t for t, _ in run]
    right = min(max(bisect_left(times, seconds), 1), len(times) - 1)
    (t0, n0), (t1, n1) = run[right - 1], run[right]
    return n0 if t1 == t0 else n0 + (n1 - n0) * min(max((seconds - t0) / (t1 - t0), 0.0), 1.0)


def worst_window(adaptive: Points, off: Points) -> float:
    """Smallest speed over off in any window; the whole run where it is shorter than a window."""
    length = min(WINDOW_S, adaptive[-1][0])
    worst = float("inf")
    start = 0.0
    while start + length <= adaptive[-1][0] + 1e-9:
        first, last = tokens_at(adaptive, start), tokens_at(adaptive, start + length)
        worst = min(worst, (seconds_at(off, last) - seconds_at(off, first)) / length)
        start += 0.5
    return worst
