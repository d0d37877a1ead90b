"""The FIFO between accepted groups and engines, and the book of reserved samples.

A group stays here until an engine has room for all its samples, so that an engine that joins late
still finds work. Strictly first come, first served: a large group at the head is not overtaken.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.router.circuit_breaker import Ticket
from rollout_server.router.circuits import Circuits
from rollout_server.router.sessions import SessionMap
from rollout_server.router.strategy import (
    Demand,
    EngineLoad,
    RouteOutcome,
    choose_engine,
    choose_relief,
)
from shared.errors import UnavailableError
from shared.pool_types import CircuitState
from shared.types import EngineState

LOGGER = logging.getLogger(__name__)

POLL_S = 0.05
"""How often waiting groups look for engines that changed state by themselves."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Waiter:
    request_id: str
    num_samples: int
    num_tokens: int
    session_id: str | None
    since_s: float
    future: asyncio.Future[Placement | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """What an engine holds, or what a group takes of it."""

    num_samples: int
    num_tokens: int
    """Prompt and completion, at the most."""


NOTHING = Reserved(num_samples=0, num_tokens=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """An engine with room reserved on it."""

    handle: EngineHandle
    reserved: Reserved
    ticket: Ticket
    """Tells the engine's circuit breaker what became of the group."""


class DispatchQueue:
    """Hands engines to waiting groups and counts what each engine holds."""

    def __init__(
        self,
        pool: EnginePool,
        *,
        max_samples_per_engine: int,
        engine_wait_timeout_s: float,
        kv_cache_usage: Callable[[str], float] = lambda engine_id: 0.0,
        circuits: Circuits | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._pool = pool
        self._circuits = circuits or Circuits(None)
        self._max_samples_per_engine = max_samples_per_engine
        self._engine_wait_timeout_s = engine_wait_timeout_s
        self._kv_cache_usage = kv_cache_usage
        self._clock = clock
        self._waiters: OrderedDict[str, _Waiter] = OrderedDict()  # by request id, in order
        self._reserved: dict[str, Reserved] = {}
        self._sessions = SessionMap()
        self._dead: set[str] = set()
        self._without_engine_since_s: float | None = None
        self._wake = asyncio.Event()

    @property
    def num_queued_samples(self) -> int:
        """Samples that wait for an engine."""
        return sum(waiter.num_samples for waiter in self._waiters.values())

    @property
    def longest_wait_s(self) -> float:
        """How long the group at the head has waited; 0 when none waits."""
        head = next(iter(self._waiters.values()), None)
        return 0.0 if head is None else self._clock() - head.since_s

    def num_reserved(self, engine_id: str) -> int:
        """Samples ``engine_id`` holds."""
        reserved = self._reserved.get(engine_id)
        return 0 if reserved is None else reserved.num_samples

    async def acquire(
        self, request_id: str, needed: Reserved, session_id: str | None = None
    ) -> Placement | None:
        """Wait for an engine with room and reserve it. Whoever gets a placement must ``release``
        what it reserves, and tell its ticket.

        Returns:
            The engine, or None when ``withdraw`` took the request out of the queue.

        Raises:
            UnavailableError: no engine could take anything for ``engine_wait_timeout_s``.
        """
        future: asyncio.Future[Placement | None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(
            request_id=request_id,
            num_samples=needed.num_samples,
            num_tokens=needed.num_tokens,
            session_id=session_id,
            since_s=self._clock(),
            future=future,
        )
        self._waiters[request_id] = waiter
        self.dispatch()
        try:
            # Bounded from outside: run() fails the future once engines have been missing for
            # engine_wait_timeout_s, and every group ahead is bounded by engine.generate_timeout_s.
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                placement = future.result()
                if placement is not None:
                    self.give_back(placement)
            elif self._waiters.pop(request_id, None) is not None:
                self.dispatch()
            raise

    def reserve_elsewhere(self, engine_id: str, needed: Reserved) -> Placement | None:
        """Room for samples that ``engine_id`` is late with, on an engine that holds less, at once.

        Returns:
            None when there is none, or groups wait: those come first.
        """
        if self._waiters:
            return None
        handles = {engine.engine_id: engine for engine in self._pool.engines()}
        demand = Demand(num_samples=needed.num_samples, num_tokens=needed.num_tokens)
        loads = [
            self._load(handle)
            for name, handle in handles.items()
            # A late sample has waited enough to be nobody's probe.
            if name == engine_id or self._circuits.state(name) is CircuitState.CLOSED
        ]
        chosen = choose_relief(loads, engine_id, demand, self._max_samples_per_engine)
        return None if chosen is None else self._place(handles[chosen], needed)

    def is_served_elsewhere(self, engine_id: str) -> bool:
        """Whether another engine serves and is admitted."""
        return any(
            engine.state is EngineState.SERVING and self._circuits.admits(engine.engine_id)
            for engine in self._pool.engines()
            if engine.engine_id not in {engine_id, *self._dead}
        )

    def give_back(self, placement: Placement) -> None:
        """It was not used."""
        self._circuits.withdrawn(placement.ticket)
        self.release(placement.handle.engine_id, placement.reserved)

    def release(self, engine_id: str, amount: Reserved) -> None:
        """Give room on ``engine_id`` back."""
        held = self._reserved[engine_id]
        left = Reserved(
            num_samples=held.num_samples - amount.num_samples,
            num_tokens=held.num_tokens - amount.num_tokens,
        )
        assert left.num_samples >= 0 <= left.num_tokens, f"more released of {engine_id} than held"
        if left.num_samples:
            self._reserved[engine_id] = left
        else:
            del self._reserved[engine_id]
        self.dispatch()

    def withdraw(self, request_id: str) -> bool:
        """Take a waiting request out of the queue. False when it does not wait."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is None:
            return False
        if not waiter.future.done():
            waiter.future.set_result(None)
        self.dispatch()
        return True

    def mark_dead(self, engine_id: str) -> None:
        """Never dispatch to ``engine_id`` again, whatever its handle still believes."""
        self._dead.add(engine_id)
        self._dead &= {engine.engine_id for engine in self._pool.engines()} | {engine_id}

    def wake(self) -> None:
        """Look again: an engine may have joined or changed state."""
        self._wake.set()

    def dispatch(self) -> None:
        """Place groups from the head of the queue for as long as one fits somewhere."""
        if not self._waiters:
            self._without_engine_since_s = None
            return
        handles = {engine.engine_id: engine for engine in self._pool.engines()}
        self._circuits.keep_only(handles.keys())
        while self._waiters:
            waiter = next(iter(self._waiters.values()))
            if waiter.future.done():  # cancelled while it waited
                del self._waiters[waiter.request_id]
                continue
            loads = [self._load(handle) for handle in handles.values()]
            demand = Demand(
                num_samples=waiter.num_samples,
                num_tokens=waiter.num_tokens,
                session_engine_id=self._sessions.engine_of(waiter.session_id),
            )
            decision = choose_engine(loads, demand, self._max_samples_per_engine)
            if decision.outcome is RouteOutcome.WAIT_FOR_ENGINE:
                if self._without_engine_since_s is None:
                    self._without_engine_since_s = self._clock()
                break
            self._without_engine_since_s = None
            if decision.engine_id is None:
                break
            del self._waiters[waiter.request_id]
            needed = Reserved(num_samples=waiter.num_samples, num_tokens=waiter.num_tokens)
            self._sessions.note(waiter.session_id, decision.engine_id)
            waiter.future.set_result(self._place(handles[decision.engine_id], needed))
        self._wake.set()

    def _place(self, handle: EngineHandle, needed: Reserved) -> Placement:
        held = self._reserved.get(handle.engine_id, NOTHING)
        self._reserved[handle.engine_id] = Reserved(
            num_samples=held.num_samples + needed.num_samples,
            num_tokens=held.num_tokens + needed.num_tokens,
        )
        # Now, not when the group's task has its turn: a probe is one group, and more may wait.
        ticket = self._circuits.dispatched(handle.engine_id)
        return Placement(handle=handle, reserved=needed, ticket=ticket)

    async def run(self) -> None:
        """Background loop: notice engines that come back, and fail waits that took too long."""
        while True:
            if self._waiters:
                self._wake.clear()
                self.dispatch()
                self._fail_overdue()
                await asyncio.sleep(POLL_S)
            else:
                # No timeout: an empty queue waits for nothing but the next group.
                self._wake.clear()
                await self._wake.wait()

    def fail_all(self, error: UnavailableError) -> None:
        """End every wait with ``error`` (shutdown)."""
        while self._waiters:
            _, waiter = self._waiters.popitem(last=False)
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _fail_overdue(self) -> None:
        since_s = self._without_engine_since_s
        if since_s is None or self._clock() - since_s < self._engine_wait_timeout_s:
            return
        states = [f"{engine.engine_id} {engine.state.value}" for engine in self._pool.engines()]
        message = (
            f"waited {self._engine_wait_timeout_s:g} s (server.engine_wait_timeout_s) for an "
            f"engine; engines: {', '.join(states) if states else 'none'}, asked for: "
            f"{self._pool.target_count}"
        )
        LOGGER.warning("failing %d waiting groups: %s", len(self._waiters), message)
        self._without_engine_since_s = None
        self.fail_all(UnavailableError(message))

    def _load(self, handle: EngineHandle) -> EngineLoad:
        dead = handle.engine_id in self._dead
        return EngineLoad(
            engine_id=handle.engine_id,
            state=EngineState.DEAD if dead else handle.state,
            num_reserved=self.num_reserved(handle.engine_id),
            num_reserved_tokens=self._reserved.get(handle.engine_id, NOTHING).num_tokens,
            kv_cache_usage=self._kv_cache_usage(handle.engine_id),
            is_admitted=self._circuits.admits(handle.engine_id),
            last_failed_s=self._circuits.last_failed_s(handle.engine_id),
        )
