"""Keeps as many engines running as were asked for: starts, drains, replaces.

One reconcile loop compares what is with what should be (``pool_plan``); everything else only
changes a target count or an engine's state and wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.background_tasks import BackgroundTasks
from rollout_server.engine.departures import Departures
from rollout_server.engine.footprint_store import FootprintStore
from rollout_server.engine.node_drains import (
    AskDrainingNodes,
    NodeWatch,
    drain_time_s,
    leaving_engines,
)
from rollout_server.engine.pool_plan import DRAINABLE_STATES, Member, plan
from rollout_server.engine.pool_record import PoolRecord
from rollout_server.engine.pooled_engine import CreateEngine, PooledEngine, find_engine
from rollout_server.engine.protocol import EngineHandle, ModelInfo
from rollout_server.engine.ray_engines import RayEngines
from shared.config.run import RunConfig
from shared.errors import (
    ConflictError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    SlipstreamError,
)
from shared.schemas.engines import EnginePoolStatus
from shared.types import EngineState

logger = logging.getLogger(__name__)

RECONCILE_INTERVAL_S = 0.5
DRAIN_POLL_S = 0.1
FOOTPRINTS_DIRECTORY = "engines"

Preparation = Callable[[EngineHandle], Awaitable[None]]


class RayEnginePool:
    """Implements ``engine.protocol.EnginePool``, over all pools of the configuration.

    Args:
        config: the run's configuration.
        model: facts of the served model.
        device: ``cpu`` or ``cuda``.
        create_engine: makes handles; Ray actors when absent.
        draining_nodes: which nodes are about to go; nobody is asked when absent.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelInfo,
        device: str,
        create_engine: CreateEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
        draining_nodes: AskDrainingNodes | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._device = device
        self._create_engine: CreateEngine = create_engine or RayEngines(config.name, config.weights)
        self._clock = clock
        engine = config.engine
        self._pools = {
            pool.name: PoolRecord(pool, engine.of_pool(pool)) for pool in engine.all_pools
        }
        self._handles: list[PooledEngine] = []
        self._draining_nodes = draining_nodes
        self._footprints = FootprintStore(config.run_dir / FOOTPRINTS_DIRECTORY)
        self._departures = Departures(self._footprints)
        self._prepare: list[Preparation] = []
        self._ids = itertools.count()
        self._tasks = BackgroundTasks()
        self._wake = asyncio.Event()
        self._reconciler: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def target_count(self) -> int:
        return sum(pool.target_count for pool in self._pools.values())

    @property
    def max_num_speculative_tokens(self) -> int:
        config = self._config
        return config.speculation.reserved_speculative_tokens if config.drafter.enabled else 0

    def engines(self) -> Sequence[EngineHandle]:
        return [handle for handle in self._handles if handle.state is not EngineState.DEAD]

    def pools(self) -> Sequence[EnginePoolStatus]:
        members, now_s = self._members(), self._clock()
        return [pool.status(members, now_s) for pool in self._pools.values()]

    def before_serving(self, preparation: Preparation) -> None:
        """Register what every engine needs before its first request (weights, policy)."""
        self._prepare.append(preparation)

    async def start(self) -> None:
        """Clean up after a server that was killed, start the configured engines, wait for all.

        Raises:
            EngineError: an engine did not start; the others are stopped.
        """
        await asyncio.to_thread(self._footprints.clean_up)
        self._reconciler = asyncio.create_task(self._reconcile_forever(), name="engine-pool")
        if self._draining_nodes is not None:
            interval_s = self._config.engine.node_poll_s
            self._tasks.spawn(NodeWatch(self._draining_nodes, interval_s, self._leave_nodes).run())
        while sum(h.state is EngineState.SERVING for h in self._handles) < self.target_count:
            reasons = [pool.restarts.last_reason for pool in self._pools.values()]
            error = next((reason for reason in reasons if reason is not None), None)
            if error is not None:
                await self.close()
                raise EngineError(f"no engine could start: {error}")
            await asyncio.sleep(DRAIN_POLL_S)

    async def scale(self, count: int, pool: str | None = None) -> None:
        record = self._named(pool)
        record.ask_for(count)
        record.clear()
        self._wake.set()

    def adjust(self, count: int, pool: str) -> None:
        self._named(pool).ask_for(count)
        self._wake.set()

    def drain(self, engine_id: str, *, replace: bool) -> None:
        handle = find_engine(self._handles, engine_id)
        if handle.state is EngineState.DRAINING:
            return
        if handle.state not in DRAINABLE_STATES:
            raise ConflictError(
                f"engine {engine_id} is {handle.state.value} and cannot be drained now: try again "
                f"when it is serving, or remove it"
            )
        self._begin_drain(handle)
        self._left(handle, "drained", replace)

    def remove(self, engine_id: str, *, replace: bool) -> None:
        handle = find_engine(self._handles, engine_id)
        handle.condemn("it was removed by request")
        if self._departures.is_leaving(engine_id):
            return  # drained already, and no longer counted
        self._handles.remove(handle)
        self._tasks.spawn(self._departures.stop(handle, "removed by request"))
        self._left(handle, "removed", replace)

    def _left(self, handle: PooledEngine, how: str, replace: bool) -> None:
        record = self._pools[handle.spec.pool]
        logger.info("engine %s is %s by request", handle.engine_id, how)
        if not replace:
            record.ask_for(max(record.target_count - 1, 0))
        self._wake.set()

    async def close(self) -> None:
        """Stop the loop, then every engine."""
        if self._reconciler is not None:
            self._reconciler.cancel()
            await asyncio.gather(self._reconciler, return_exceptions=True)
        await self._tasks.cancel()
        engines = [*self._handles, *(self._departures.ending - {*self._handles})]
        stops = (self._departures.stop(handle, "server is shutting down") for handle in engines)
        await asyncio.gather(*stops, return_exceptions=True)
        self._handles.clear()

    def _named(self, pool: str | None) -> PoolRecord:
        if pool is None and len(self._pools) == 1:
            return next(iter(self._pools.values()))
        if pool is None or pool not in self._pools:
            raise InvalidRequestError(
                f"pool {pool!r} is none of engine.pools: {', '.join(self._pools)}", param="pool"
            )
        return self._pools[pool]

    def _members(self) -> list[Member]:
        return [
            Member(engine_id=handle.engine_id, pool=handle.spec.pool, state=handle.state)
            for handle in self._handles
        ]

    async def _reconcile_forever(self) -> None:
        while True:
            self._reconcile()
            # Not asyncio.wait_for: until Python 3.12 it swallows a cancellation at a wake-up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_INTERVAL_S):
                    await self._wake.wait()
            self._wake.clear()

    def _reconcile(self) -> None:
        now_s = self._clock()
        for handle in [h for h in self._handles if h.state is EngineState.DEAD]:
            if not self._departures.is_leaving(handle.engine_id):
                self._handles.remove(handle)
                reason = handle.error or "dead"
                self._pools[handle.spec.pool].lost(handle.engine_id, reason, now_s)
                self._tasks.spawn(self._departures.stop(handle, reason))
        todo = plan(self._members(), [pool.wish(now_s) for pool in self._pools.values()])
        for name, num_missing in todo.starts.items():
            for _ in range(num_missing):
                self._launch(self._pools[name])
        for handle in [h for h in self._handles if h.engine_id in todo.drains]:
            self._begin_drain(handle)

    def _leave_nodes(self, draining: Mapping[str, float | None]) -> None:
        """These nodes are about to go: their engines make room for others, elsewhere."""
        for handle in leaving_engines(self._handles, draining):
            timeout_s = self._config.engine.drain_timeout_s
            within_s = drain_time_s(timeout_s, draining[handle.node_id], time.time())
            logger.warning(
                "engine %s is replaced: node %s is about to go; %.0f s to finish what it holds",
                handle.engine_id,
                handle.node_id,
                within_s,
            )
            self._begin_drain(handle, within_s)
            self._wake.set()

    def _launch(self, pool: PoolRecord) -> None:
        config = self._config
        spec = EngineSpec(
            engine_id=f"engine-{next(self._ids)}",
            index=self._free_index(pool),
            model=config.model,
            engine=pool.engine,
            drafter=config.drafter,
            speculation=config.speculation,
            device=self._device,
            pool=pool.name,
            calibrations=pool.calibrations,
        )
        handle = self._create_engine(spec)
        self._handles.append(handle)
        self._tasks.spawn(self._bring_up(handle))

    def _free_index(self, pool: PoolRecord) -> int:
        """Smallest index not in use, so that a replacement takes over the cores of the dead."""
        cores = pool.engine.cpu_cores
        used = {h.spec.index for h in self._handles if h.spec.engine.cpu_cores == cores}
        return next(index for index in itertools.count() if index not in used)

    async def _bring_up(self, handle: PooledEngine) -> None:
        try:
            facts = await handle.start()
            if handle.footprint is not None:
                self._footprints.remember(handle.engine_id, handle.footprint)
            for preparation in self._prepare:
                await preparation(handle)
            if handle.state is EngineState.DEAD:
                raise EngineDeadError(handle.error or "it died")
            handle.serve()
        except SlipstreamError as exc:
            logger.error("engine %s failed to start: %s", handle.engine_id, exc.message)
            handle.condemn(f"it did not start: {exc.message}")
        except Exception as exc:  # or it would be STARTING for ever, whatever went wrong
            logger.exception("engine %s failed to start", handle.engine_id)
            handle.condemn(f"it did not start: {exc!r}")
        else:
            self._pools[handle.spec.pool].started(facts)
            logger.info(
                "engine %s is serving after %.1f s: %d KV blocks of %d tokens, drafter %.1f MiB",
                handle.engine_id,
                facts.start_up_s,
                facts.num_kv_blocks,
                facts.block_size,
                facts.drafter_bytes / 2**20,
            )
        if handle not in self._handles:  # removed while Ray was still making it
            self._tasks.spawn(self._departures.stop(handle, "removed while it started"))
        self._wake.set()

    def _begin_drain(self, handle: PooledEngine, within_s: float | None = None) -> None:
        handle.begin_drain()
        timeout_s = self._config.engine.drain_timeout_s if within_s is None else within_s
        self._tasks.spawn(self._drain(handle, timeout_s))

    async def _drain(self, handle: PooledEngine, within_s: float) -> None:
        await self._departures.until_idle(handle, within_s, DRAIN_POLL_S)
        if handle in self._handles:  # else it died before this began
            self._handles.remove(handle)
        self._departures.left(handle.engine_id)
        await self._departures.stop(handle, "drained")
        logger.info("engine %s drained and stopped", handle.engine_id)
