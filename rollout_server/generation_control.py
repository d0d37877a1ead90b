"""An operator's pause over every engine, those that join meanwhile included.

A pause is of generation only: requests are accepted and queued, pushes go on (an engine that was
paused before a commit is paused after it). ``POST /v1/pause`` and ``/v1/resume`` come here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from rollout_server.engine.protocol import EngineHandle, EnginePool
from shared.errors import EngineDeadError, EngineError
from shared.types import EngineState, PauseMode

LOGGER = logging.getLogger(__name__)

NOT_RUNNING = frozenset({EngineState.STARTING, EngineState.DEAD})
"""A joiner is paused by ``apply_to`` before it serves."""
NOT_PAUSED = NOT_RUNNING | {EngineState.DRAINING}
"""A leaver finishes what it has; it is resumed, for it may have been paused before."""


class GenerationControl:
    """Owns the pause that stands; engines follow it.

    A pause under ``wait`` answers only when everything has finished. ``resume`` may come before
    that and ends it; it is not held up by it.
    """

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._mode: PauseMode | None = None

    @property
    def pause_mode(self) -> PauseMode | None:
        """None while engines generate."""
        return self._mode

    async def pause(self, mode: PauseMode, *, caller: str = "the server") -> None:
        """Stop generating on every engine. Again with another mode: what still runs follows it.

        Raises:
            EngineError: an engine did not stop in time; the pause stands on all of them.
        """
        LOGGER.info("generation paused by %s, mode %s", caller, mode.value)
        self._mode = mode
        await self._on_every_engine(lambda engine: engine.pause_generation(mode), NOT_PAUSED)

    async def resume(self, *, caller: str = "the server") -> None:
        """Generate again. Does nothing where nothing was paused.

        Raises:
            EngineError: an engine did not answer.
        """
        LOGGER.info("generation resumed by %s", caller)
        self._mode = None
        await self._on_every_engine(lambda engine: engine.resume_generation(), NOT_RUNNING)

    async def apply_to(self, engine: EngineHandle) -> None:
        """Pause an engine that is about to serve, if a pause stands. The last of its preparations:
        whatever is asked for after this returns finds it serving."""
        applied: PauseMode | None = None
        while applied is not self._mode:
            applied = self._mode
            if applied is None:
                await engine.resume_generation()
            else:
                await engine.pause_generation(applied)

    async def _on_every_engine(
        self,
        change: Callable[[EngineHandle], Awaitable[None]],
        left_alone: frozenset[EngineState],
    ) -> None:
        engines = [engine for engine in self._pool.engines() if engine.state not in left_alone]
        outcomes = await asyncio.gather(
            *(change(engine) for engine in engines), return_exceptions=True
        )
        # One that died meanwhile is replaced, and its replacement follows what stands.
        failed = [
            outcome
            for outcome in outcomes
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineDeadError)
        ]
        if others := [exc for exc in failed if not isinstance(exc, EngineError)]:
            raise others[0]
        if failed:
            raise EngineError("; ".join(str(exc) for exc in failed))
