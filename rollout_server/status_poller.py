"""Keeps the latest status of every engine, so that nobody who needs it waits for an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.health_watch import HealthWatch
from shared.errors import EngineDeadError, EngineError
from shared.pool_types import CircuitState
from shared.schemas.engines import EngineStatus
from shared.schemas.speculation import EngineSpeculation
from shared.types import DrafterScheme, EngineState

LOGGER = logging.getLogger(__name__)

NO_HISTORY_STEP = 2**62
"""A ``since_step`` after every step: the report comes without its history."""

SILENT_STATES = frozenset({EngineState.STARTING, EngineState.DEAD})
"""States in which an engine has nothing to say."""


class StatusPoller:
    """Asks each engine for itself: one that hangs does not hold up the others' figures."""

    def __init__(
        self,
        pool: EnginePool,
        *,
        interval_s: float,
        timeout_s: float,
        health: HealthWatch,
        num_reserved: Callable[[str], int],
        circuit: Callable[[str], CircuitState] = lambda engine_id: CircuitState.CLOSED,
        on_tick: Callable[[], None],
        wanted_since_step: Callable[[str], int] = lambda engine_id: NO_HISTORY_STEP,
        on_speculation: Callable[[EngineSpeculation], None] = lambda report: None,
    ) -> None:
        """
        Args:
            timeout_s: ``engine.status_timeout_s``, of each question.
            circuit: by engine id, for the records.
            health: told of every answer, and of every failure to answer in time.
            wanted_since_step: by engine id: reports carry decisions after this step.
            on_speculation: told of every report.
        """
        self._pool = pool
        self._interval_s = interval_s
        self._num_reserved = num_reserved
        self._circuit = circuit
        self._on_tick = on_tick
        self._wanted_since_step = wanted_since_step
        self._on_speculation = on_speculation
        self._timeout_s = timeout_s
        self._health = health
        self._statuses: dict[str, EngineStatus] = {}
        self._speculation: dict[str, EngineSpeculation] = {}
        self._answered_s: dict[str, float] = {}
        self._errors: dict[str, str] = {}
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        """Of engines that owe a status."""
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start polling."""
        self._loop_task = asyncio.create_task(self._run(), name="status-poller")

    async def close(self) -> None:
        """Stop. Idempotent."""
        tasks = [*self._polls.values(), *self._watches.values()]
        if self._loop_task is not None:
            tasks.append(self._loop_task)
            self._loop_task = None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._polls.clear()
        self._watches.clear()

    def statuses(self) -> list[EngineStatus]:
        """One record per engine of the pool: the last poll, with state and reservations of now."""
        return [self._status_of(engine) for engine in self._pool.engines()]

    def speculation(self) -> list[EngineSpeculation]:
        """Last reports, without history, of the engines that gave one."""
        known = (self._speculation.get(engine.engine_id) for engine in self._pool.engines())
        return [report for report in known if report is not None]

    def ages_s(self) -> dict[str, float]:
        """Seconds since the last answer of every engine that has given one."""
        now_s = monotonic()
        return {
            engine.engine_id: now_s - self._answered_s[engine.engine_id]
            for engine in self._pool.engines()
            if engine.engine_id in self._answered_s
        }

    def kv_cache_usage(self, engine_id: str) -> float:
        """Fraction 0..1 as of the last poll; 0 when there was none."""
        status = self._statuses.get(engine_id)
        return 0.0 if status is None else status.kv_cache_usage

    def kv_capacity_tokens(self, engine_id: str) -> int | None:
        """KV slots; None before the first poll."""
        status = self._statuses.get(engine_id)
        return None if status is None else status.num_kv_blocks * status.block_size

    async def _run(self) -> None:
        while True:
            engines = {engine.engine_id: engine for engine in self._pool.engines()}
            self._health.forget_others(list(engines.values()))
            for cache in (self._statuses, self._speculation, self._answered_s, self._errors):
                for engine_id in cache.keys() - engines.keys():
                    del cache[engine_id]
            self._polls = {name: task for name, task in self._polls.items() if not task.done()}
            for engine_id in self._watches.keys() - engines.keys():
                self._watches.pop(engine_id).cancel()
            for engine_id, engine in engines.items():
                if engine_id not in self._polls and engine.state not in SILENT_STATES:
                    self._polls[engine_id] = asyncio.create_task(
                        self._poll(engine), name=f"status {engine_id}"
                    )
            self._on_tick()
            await asyncio.sleep(self._interval_s)

    async def _poll(self, engine: EngineHandle) -> None:
        engine_id = engine.engine_id
        try:
            self._statuses[engine_id] = await self._ask_for_status(engine)
            async with asyncio.timeout(self._timeout_s):
                report = await engine.speculation(self._wanted_since_step(engine_id))
            self._on_speculation(report)
            self._speculation[engine_id] = report.model_copy(update={"history": []})
            self._answered_s[engine_id] = monotonic()
            self._errors.pop(engine_id, None)
        except EngineDeadError as exc:
            self._errors[engine_id] = exc.message
        except TimeoutError:
            LOGGER.warning(
                "engine %s did not tell of its speculation within %g s (engine.status_timeout_s)",
                engine_id,
                self._timeout_s,
            )
        except EngineError as exc:
            # Slow or busy; the last figures stand until it answers again.
            LOGGER.warning("status of engine %s failed: %s", engine_id, exc.message)

    async def _ask_for_status(self, engine: EngineHandle) -> EngineStatus:
        """Ask again at once while it is late: what it owes is the same, and it is watched on."""
        try:
            while True:
                self._watch(engine)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        status = await engine.status()
                    break
                except TimeoutError:
                    self._note_late(engine)
        finally:
            if (watch := self._watches.pop(engine.engine_id, None)) is not None:
                watch.cancel()
        self._health.answered(engine, status)
        return status

    def _note_late(self, engine: EngineHandle) -> None:
        LOGGER.warning(
            "engine %s did not answer within %g s (engine.status_timeout_s)",
            engine.engine_id,
            self._timeout_s,
        )
        self._health.timed_out(engine)
        if engine.state in SILENT_STATES:
            raise EngineDeadError(f"engine {engine.engine_id} was given up: {engine.error}")

    def _watch(self, engine: EngineHandle) -> None:
        """Until it has answered; one that froze is given up before its answers are too late."""
        engine_id = engine.engine_id
        watch = self._watches.get(engine_id)
        if watch is None or watch.done():
            self._watches[engine_id] = asyncio.create_task(
                self._give_up_if_frozen(engine), name=f"watch {engine_id}"
            )

    async def _give_up_if_frozen(self, engine: EngineHandle) -> None:
        with suppress(EngineError):  # it is dead already
            self._health.froze(engine, await engine.until_standstill())

    def _status_of(self, engine: EngineHandle) -> EngineStatus:
        engine_id = engine.engine_id
        error = self._errors.get(engine_id)
        last = self._statuses.get(engine_id) or _unknown_status(engine)
        return last.model_copy(
            update={
                "state": engine.state if error is None else EngineState.DEAD,
                "error": error or last.error,
                "num_reserved": self._num_reserved(engine_id),
                "health": self._health.health(engine_id),
                "circuit": self._circuit(engine_id),
            }
        )


def _unknown_status(engine: EngineHandle) -> EngineStatus:
    """Of an engine that has not answered yet (it starts): zeros."""
    return EngineStatus(
        engine_id=engine.engine_id,
        node_id=engine.node_id,
        state=engine.state,
        pid=None,
        cpu_cores=None,
        target_version=engine.committed_version,
        drafter_version=engine.committed_version,
        drafter_scheme=DrafterScheme.AUTO,
        num_running_reqs=0,
        num_waiting_reqs=0,
        kv_cache_usage=0.0,
        num_kv_blocks=0,
        block_size=0,
        max_model_len=0,
        num_generation_tokens=0,
        num_prompt_tokens=0,
        num_preemptions=0,
        num_reserved=0,
        start_up_s=0.0,
        uptime_s=0.0,
    )
