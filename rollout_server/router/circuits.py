"""The circuit breakers of all engines, with their clock, log lines and count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from time import monotonic

from rollout_server.router.circuit_breaker import BreakerLimits, CircuitBreaker, Ticket
from shared.logging import log_context
from shared.pool_types import CircuitState

LOGGER = logging.getLogger(__name__)


class Circuits:
    """Engines without a failure of late have no breaker that says anything.

    Args:
        limits: None admits every engine always.
    """

    def __init__(
        self, limits: BreakerLimits | None, clock: Callable[[], float] = monotonic
    ) -> None:
        self.num_openings = 0
        self._limits = limits
        self._clock = clock
        self._breakers: dict[str, CircuitBreaker] = {}

    def state(self, engine_id: str) -> CircuitState:
        """As of now."""
        breaker = self._breakers.get(engine_id)
        return CircuitState.CLOSED if breaker is None else breaker.state(self._clock())

    def admits(self, engine_id: str) -> bool:
        """Whether the engine should get the next group, if it is to be had elsewhere too."""
        breaker = self._breakers.get(engine_id)
        return breaker is None or breaker.admits(self._clock())

    def last_failed_s(self, engine_id: str) -> float:
        """Of the clock; minus infinity where nothing has failed."""
        breaker = self._breakers.get(engine_id)
        return float("-inf") if breaker is None else breaker.last_failed_s

    def dispatched(self, engine_id: str) -> Ticket:
        """It gets a group, whose end is told with the ticket."""
        if self._limits is None:
            return Ticket(engine_id=engine_id, epoch=0, is_probe=False)
        breaker = self._breakers.get(engine_id)
        if breaker is None:
            breaker = self._breakers[engine_id] = CircuitBreaker(engine_id, self._limits)
        return breaker.dispatched(self._clock())

    def progressed(self, ticket: Ticket) -> None:
        """The group has tokens."""
        self._tell(ticket, lambda breaker: breaker.progressed(ticket))

    def succeeded(self, ticket: Ticket) -> None:
        """The group finished."""
        self._tell(ticket, lambda breaker: breaker.succeeded(ticket))

    def failed(self, ticket: Ticket, reason: str) -> None:
        """The engine failed the group."""
        self._tell(ticket, lambda breaker: breaker.failed(ticket, self._clock()), reason)

    def withdrawn(self, ticket: Ticket) -> None:
        """The group ended in a way that tells nothing of the engine."""
        self._tell(ticket, lambda breaker: breaker.withdrawn(ticket))

    def keep_only(self, engine_ids: Collection[str]) -> None:
        """Only these are left."""
        for engine_id in self._breakers.keys() - engine_ids:
            del self._breakers[engine_id]

    def _tell(
        self, ticket: Ticket, news: Callable[[CircuitBreaker], None], reason: str = ""
    ) -> None:
        breaker = self._breakers.get(ticket.engine_id)
        if breaker is None:  # the engine is gone
            return
        before = breaker.state(self._clock())
        news(breaker)
        after = breaker.state(self._clock())
        if after is before:
            return
        with log_context(engine_id=ticket.engine_id):
            if after is CircuitState.OPEN:
                self.num_openings += 1
                LOGGER.warning(
                    "engine %s fails what it is given and gets no groups for %g s while others "
                    "serve (server.circuit_breaker); the last failed with: %s",
                    ticket.engine_id,
                    breaker.open_for_s(self._clock()),
                    reason,
                )
            else:
                LOGGER.info("engine %s: circuit %s", ticket.engine_id, after.value)
