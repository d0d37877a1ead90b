"""Whether an engine that serves still gets groups. A state machine; time is passed in.

For engines that answer and fail what they are given. One that is dead gets nothing anyway, and one
that hangs is given up by its health (``rollout_server/health.py``).

Example, with 3 failures and 5 s, at most 120 s::

    two groups fail, one finishes, two fail  -> CLOSED: never three in a row
    three in a row fail                      -> OPEN for 5 s
    5 s later                                -> HALF_OPEN: one group is the probe
    the probe finishes                       -> CLOSED, and everything is forgotten
    the probe fails                          -> OPEN for 10 s
    the probe has tokens                     -> CLOSED; the next failure opens it, for 10 s
    the probe is aborted by its client       -> HALF_OPEN, and the next group is the probe
    a group from before it opened ends       -> nothing: that tells of the time before
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.config.routing import CircuitBreakerConfig
from shared.pool_types import CIRCUIT_TRANSITIONS, CircuitState


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerLimits:
    """Settings ``server.circuit_breaker``."""

    num_failures: int
    open_s: float
    max_open_s: float

    @classmethod
    def of(cls, config: CircuitBreakerConfig) -> BreakerLimits | None:
        """From the configuration; None where it is off."""
        if not config.enabled:
            return None
        return cls(
            num_failures=config.num_failures, open_s=config.open_s, max_open_s=config.max_open_s
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """What a group has from the breaker of its engine, and tells its end with."""

    engine_id: str
    epoch: int
    """How often the circuit had opened by then."""
    is_probe: bool
    """It finds out whether the engine works again."""


class CircuitBreaker:
    """Of one engine. ``dispatched`` gives a ticket, and one of the ends follows: ``succeeded``,
    ``failed`` or ``withdrawn``."""

    def __init__(self, engine_id: str, limits: BreakerLimits) -> None:
        self._engine_id = engine_id
        self._limits = limits
        self._state = CircuitState.CLOSED
        self._epoch = 0
        self._num_failures = 0
        """In a row, while CLOSED."""
        self._num_openings = 0
        """Since a group last finished."""
        self._open_until_s = 0.0
        self._num_probes = 0
        """Out now, while HALF_OPEN."""
        self._last_failed_s = float("-inf")

    @property
    def last_failed_s(self) -> float:
        """When a group last failed here; minus infinity if none ever did."""
        return self._last_failed_s

    def state(self, now_s: float) -> CircuitState:
        """As of now."""
        if self._state is CircuitState.OPEN and now_s >= self._open_until_s:
            self._move(CircuitState.HALF_OPEN)
        return self._state

    def open_for_s(self, now_s: float) -> float:
        """How long it stays OPEN; 0 in other states."""
        return self._open_until_s - now_s if self.state(now_s) is CircuitState.OPEN else 0.0

    def admits(self, now_s: float) -> bool:
        """Whether the engine should get the next group, if it is to be had elsewhere too."""
        state = self.state(now_s)
        if state is CircuitState.HALF_OPEN:
            return self._num_probes == 0
        return state is CircuitState.CLOSED

    def dispatched(self, now_s: float) -> Ticket:
        """It gets a group, admitted or not: where no engine admits any, one is tried all the same,
        and that group is a probe before its time."""
        if self.state(now_s) is CircuitState.OPEN:
            self._move(CircuitState.HALF_OPEN)
        is_probe = self._state is CircuitState.HALF_OPEN
        self._num_probes += is_probe
        return Ticket(engine_id=self._engine_id, epoch=self._epoch, is_probe=is_probe)

    def progressed(self, ticket: Ticket) -> None:
        """The group has tokens. Groups can take many minutes, and a probe holds up the others; but
        an engine that fails later on must not begin anew with all its failures and the shortest
        time, so that only a group that finishes takes those back."""
        if ticket.epoch == self._epoch and self._state is CircuitState.HALF_OPEN:
            self._move(CircuitState.CLOSED)
            self._num_failures = self._limits.num_failures - 1

    def succeeded(self, ticket: Ticket) -> None:
        """The group finished."""
        if ticket.epoch != self._epoch:
            return
        if self._state is CircuitState.HALF_OPEN:
            self._move(CircuitState.CLOSED)
        self._num_failures = 0
        self._num_openings = 0

    def failed(self, ticket: Ticket, now_s: float) -> None:
        """The group failed, and not because of what it asked for."""
        self._last_failed_s = max(now_s, self._last_failed_s)
        if ticket.epoch != self._epoch:
            return
        self._num_failures += 1
        is_probing = self._state is CircuitState.HALF_OPEN
        if is_probing or self._num_failures >= self._limits.num_failures:
            self._open(now_s)

    def withdrawn(self, ticket: Ticket) -> None:
        """The group ended in a way that tells nothing of the engine."""
        if ticket.epoch == self._epoch and self._state is CircuitState.HALF_OPEN:
            self._num_probes -= 1

    def _open(self, now_s: float) -> None:
        self._move(CircuitState.OPEN)
        self._epoch += 1
        self._num_failures = 0
        # Powers beyond the cap would overflow a float some day.
        exponent = min(self._num_openings, 32)
        wait_s = min(self._limits.open_s * 2.0**exponent, self._limits.max_open_s)
        self._num_openings += 1
        self._open_until_s = now_s + wait_s

    def _move(self, state: CircuitState) -> None:
        assert state in CIRCUIT_TRANSITIONS[self._state], f"{self._state} to {state}"
        self._state = state
        self._num_probes = 0
