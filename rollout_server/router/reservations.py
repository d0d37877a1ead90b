"""A group's room on an engine, from its turn in the queue to what its end says of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rollout_server.engine.protocol import EngineHandle, GenerateRequest
from rollout_server.router.circuits import Circuits
from rollout_server.router.dispatch_queue import DispatchQueue, Placement, Reserved
from rollout_server.router.live_group import LiveGroup
from shared.errors import EngineDeadError, EngineError
from shared.types import EngineState


def room_for(request: GenerateRequest, num_samples: int) -> Reserved:
    """What so many samples of a request may come to."""
    num_tokens = len(request.prompt_token_ids) + num_samples * request.sampling.max_tokens
    return Reserved(num_samples=num_samples, num_tokens=num_tokens)


class Reservations:
    """Over one queue and the circuit breakers of its engines."""

    def __init__(
        self, queue: DispatchQueue, circuits: Circuits, clock: Callable[[], float]
    ) -> None:
        self._queue = queue
        self._circuits = circuits
        self._clock = clock

    @asynccontextmanager
    async def hold(self, live: LiveGroup, num_samples: int) -> AsyncIterator[EngineHandle | None]:
        """Yields an engine with the samples reserved on it, or None for an aborted request.

        How the body ends is told to the engine's circuit breaker.
        """
        placement = self._taken_ahead(live)
        if placement is None and not live.is_aborted:
            request = live.request
            needed = room_for(request, num_samples)
            if live.late_on is not None:
                # What was reserved is gone: not back to where it came from.
                placement = self._queue.reserve_elsewhere(live.late_on, needed)
            if placement is None:
                placement = await self._queue.acquire(
                    request.request_id, needed, request.session_id
                )
        if placement is None:
            yield None
            return
        live.placement, live.late_on, live.is_told = placement, None, False
        if live.since_s is None:
            live.since_s = self._clock()
        try:
            # An abort may have come between the reservation and this task's turn.
            yield None if live.is_aborted else placement.handle
        except BaseException as exc:  # cancelled ones tell as much as those with a wrong request
            self._failed(placement, exc)
            raise
        else:
            if live.is_told:
                pass
            elif live.is_aborted or placement.handle.state is EngineState.DEAD:
                self._circuits.withdrawn(placement.ticket)
            else:
                self._circuits.succeeded(placement.ticket)
        finally:
            live.placement = None
            self._queue.release(placement.handle.engine_id, placement.reserved)

    def probe_failed(self, live: LiveGroup, exc: EngineError) -> bool:
        """Whether the group was a probe that another engine can take: its failure is this one's to
        bear then, and its breaker is told."""
        placement = live.placement
        if placement is None or not placement.ticket.is_probe:
            return False
        if not self._queue.is_served_elsewhere(placement.handle.engine_id):
            return False  # or requests that are at fault themselves would be tried over and over
        self._failed(placement, exc)
        live.is_told = True
        return True

    def drop_ahead(self, live: LiveGroup) -> None:
        """Room that was reserved for a hand-over is not needed any more, if there was any."""
        if live.ahead is not None:
            self._queue.give_back(live.ahead)
            live.ahead = None

    def _taken_ahead(self, live: LiveGroup) -> Placement | None:
        ahead = live.ahead
        if ahead is None or live.is_aborted or ahead.handle.state is not EngineState.SERVING:
            self.drop_ahead(live)
            return None
        live.ahead = None
        return ahead

    def _failed(self, placement: Placement, exc: BaseException) -> None:
        """Counts against the engine only what it does wrong while it serves."""
        serves = placement.handle.state is EngineState.SERVING
        if serves and isinstance(exc, EngineError) and not isinstance(exc, EngineDeadError):
            self._circuits.failed(placement.ticket, exc.message)
        else:
            self._circuits.withdrawn(placement.ticket)
