"""Enums of engines and pools: where engines are put, how they are, when they are replaced."""

from enum import StrEnum


class PlacementStrategy(StrEnum):
    """On which of the nodes that have room an engine goes. A wish: a full node is passed over."""

    PACK = "pack"
    """Where most engines of the pool are already; the first one beside the server."""
    SPREAD = "spread"
    """Where the fewest are, so that losing a node costs few of them."""


class EngineHealth(StrEnum):
    """What the server makes of an engine's last answers."""

    HEALTHY = "healthy"
    SLOW = "slow"
    """Late, but not for long enough to be given up. Nothing is done about it."""
    SICK = "sick"
    """Given up: it is replaced."""


class Sickness(StrEnum):
    """Why an engine was given up."""

    NO_PROGRESS = "no_progress"
    """It holds work and made no token for ``engine.progress_timeout_s``."""
    FROZEN = "frozen"
    """It owed an answer, and none of its processes did anything for ``engine.frozen_timeout_s``."""
    NO_STATUS = "no_status"
    """``engine.max_status_timeouts`` questions in a row were not answered in time."""


class RestartState(StrEnum):
    """Whether a pool starts engines in place of those it lost."""

    READY = "ready"
    BACKING_OFF = "backing_off"
    """It waits a while after a failure, longer after each further one."""
    QUARANTINED = "quarantined"
    """It lost more engines than its budget allows, and starts none until an operator asks for a
    count again (``PUT /v1/engines``)."""


RESTART_TRANSITIONS: dict[RestartState, frozenset[RestartState]] = {
    RestartState.READY: frozenset({RestartState.BACKING_OFF, RestartState.QUARANTINED}),
    RestartState.BACKING_OFF: frozenset({RestartState.READY, RestartState.QUARANTINED}),
    # Only an operator leads out of it.
    RestartState.QUARANTINED: frozenset({RestartState.READY}),
}


class CircuitState(StrEnum):
    """Whether the router gives an engine groups, from how its last ones ended."""

    CLOSED = "closed"
    """It gets groups."""
    OPEN = "open"
    """Groups failed on it one after the other: for a while it gets none that another can take."""
    HALF_OPEN = "half_open"
    """That while is over, and one group tries the engine."""


CIRCUIT_TRANSITIONS: dict[CircuitState, frozenset[CircuitState]] = {
    CircuitState.CLOSED: frozenset({CircuitState.OPEN}),
    # Never straight to CLOSED: something has to be tried first.
    CircuitState.OPEN: frozenset({CircuitState.HALF_OPEN}),
    CircuitState.HALF_OPEN: frozenset({CircuitState.CLOSED, CircuitState.OPEN}),
}


class ScalingReason(StrEnum):
    """Why the autoscaling policy wants the count it wants."""

    STEADY = "steady"
    """Nothing asks for another count, or not for long enough."""
    QUEUE = "queue"
    """Samples wait in the router."""
    KV_PRESSURE = "kv_pressure"
    """Requests wait inside engines whose KV caches are full."""
    IDLE = "idle"
    """What there is to do fits into fewer engines."""
    STARTING = "starting"
    """More are wanted, but those asked for before do not serve yet."""
    COOLDOWN = "cooldown"
    """The last change is too recent."""
    LIMIT = "limit"
    """The count was outside ``engine.autoscaling.min_count`` and ``max_count``."""
