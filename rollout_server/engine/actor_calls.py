"""Calls of one engine's Ray actor: time limits, Ray's errors turned into ours, and the fence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from rollout_server.engine.fence import Fence, FencedOffError
from rollout_server.engine.footprint import Footprint, merged
from rollout_server.engine.footprint_record import remove_own_traces
from rollout_server.engine.lifecycle import EngineLifecycle
from rollout_server.engine.standstill import (
    Activity,
    StandstillLimits,
    activity_of,
    until_standstill,
)
from shared.errors import EngineDeadError, EngineError, SlipstreamError, WeightCommitError
from shared.types import EngineState

FOOTPRINT_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 30.0


class ActorCalls:
    """From the moment the engine is DEAD every call raises, also those that wait."""

    def __init__(self, engine_id: str) -> None:
        self.lifecycle = EngineLifecycle()
        self._engine_id = engine_id
        self._fence = Fence()

    def die(self, reason: str) -> None:
        """To DEAD from anywhere; the first reason is kept."""
        self.lifecycle.die(reason)
        self._fence.close()

    def check_alive(self) -> None:
        """
        Raises:
            EngineDeadError: it is not.
        """
        if self.lifecycle.state is EngineState.DEAD:
            raise self._dead()

    async def call(self, reference: Awaitable[Any], purpose: str, timeout_s: float) -> Any:
        """Await an actor call, waiting at most ``timeout_s``.

        Args:
            purpose: ends the sentence "took longer than 5 s ...".

        Raises:
            EngineDeadError: the engine is gone, or was given up meanwhile.
            EngineError: it took too long or failed.
        """
        try:
            return await self._fence.answer(reference, timeout_s)
        except FencedOffError:
            raise self._dead() from None
        except TimeoutError as exc:
            raise EngineError(
                f"engine {self._engine_id} took longer than {timeout_s} s {purpose}"
            ) from exc
        except RayError as exc:
            raise self._translate(exc) from exc

    async def call_or_die(
        self,
        reference: Awaitable[Any],
        purpose: str,
        timeout_s: float,
        standstill: Coroutine[Any, Any, str],
    ) -> Any:
        """A call whose failure, or cancellation, is the engine's end: nobody knows how far it got.

        Args:
            standstill: ends, with the reason, when the engine is to be given up before that.

        Raises:
            WeightCommitError: it failed, and is dead now.
        """
        watching = asyncio.create_task(standstill)
        watching.add_done_callback(self._die_of)
        try:
            return await self.call(reference, purpose, timeout_s)
        except BaseException as exc:
            # Also when cancelled: half-loaded weights must not serve, whatever broke the call off.
            self.die(f"it failed {purpose}: {exc}")
            if isinstance(exc, SlipstreamError):
                raise WeightCommitError(exc.message) from exc
            raise
        finally:
            watching.cancel()

    async def until_standstill(self, actor: Any, limits: StandstillLimits) -> str:
        """See ``standstill.until_standstill``."""

        def look() -> Awaitable[Activity]:
            reference = actor.__ray_call__.remote(activity_of)
            # Longer than the watch waits for a look.
            return self.call(reference, "to look at itself", 2 * limits.answer_timeout_s)

        return await until_standstill(look, limits)

    def _die_of(self, watching: asyncio.Task[str]) -> None:
        if not watching.cancelled() and watching.exception() is None:
            self.die(watching.result())

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(f"engine {self._engine_id} is dead: {self.lifecycle.error}")

    def _translate(self, exc: RayError) -> SlipstreamError:
        """The one place where Ray's errors become ours."""
        if isinstance(exc, RayTaskError) and isinstance(exc.cause, SlipstreamError):
            if isinstance(exc.cause, EngineDeadError):
                self.die(exc.cause.message)
            return exc.cause
        if isinstance(exc, RayActorError):
            self.die(f"its process ended: {exc}")
            return EngineDeadError(f"engine {self._engine_id} is gone: {exc}")
        return EngineError(f"engine {self._engine_id} failed: {exc}")


async def end_actor(actor: Any, footprint: Footprint | None) -> Footprint | None:
    """Ask an actor to shut down, behind the fence: what it answers now is for nobody else.

    One that does not even list its processes hangs, and would not shut down either.

    Args:
        footprint: what it had when it started.

    Returns:
        What may be left of it. A child that was killed is no longer seen, but was when it started.
    """
    with contextlib.suppress(RayError, TimeoutError):
        async with asyncio.timeout(FOOTPRINT_TIMEOUT_S):
            latest: Footprint = await actor.footprint.remote()
        footprint = merged(footprint, latest)
        async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
            await actor.shutdown.remote()
        # On its own host, which may not be ours: what follows is a kill.
        async with asyncio.timeout(FOOTPRINT_TIMEOUT_S):
            await actor.__ray_call__.remote(remove_own_traces)
    return footprint
