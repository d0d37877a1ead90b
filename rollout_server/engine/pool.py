"""Keeps as many engines running as were asked for: starts, drains, replaces.

One reconcile loop compares what is with what should be; everything else only changes the target
count or an engine's state and wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.cluster import create_engine_actor
from rollout_server.engine.footprint_store import FootprintStore
from rollout_server.engine.handle import RayEngineHandle
from rollout_server.engine.protocol import EngineHandle, ModelInfo
from shared.config.run import RunConfig
from shared.errors import (
    ConflictError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    SlipstreamError,
    UnknownResourceError,
)
from shared.types import EngineState

logger = logging.getLogger(__name__)

RECONCILE_INTERVAL_S = 0.5
DRAIN_POLL_S = 0.1
FOOTPRINTS_DIRECTORY = "engines"
MAX_START_FAILURES = 3
"""Failed starts in a row after which the pool gives up, so that a broken model does not loop."""
BACKOFF_S = 2.0

LIVE_STATES = frozenset(
    {EngineState.STARTING, EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING}
)
DRAINABLE_STATES = frozenset({EngineState.SERVING, EngineState.PAUSED})
"""A start or a commit is left to finish first."""
Preparation = Callable[[EngineHandle], Awaitable[None]]


class RayEnginePool:
    """Implements ``engine.protocol.EnginePool``.

    Args:
        config: the run's configuration.
        model: facts of the served model.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, config: RunConfig, model: ModelInfo, device: str) -> None:
        self._config = config
        self._model = model
        self._device = device
        self._handles: list[RayEngineHandle] = []
        self._target_count = config.engine.count
        self._footprints = FootprintStore(config.run_dir / FOOTPRINTS_DIRECTORY)
        self._prepare: list[Preparation] = []
        self._indices = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._reconciler: asyncio.Task[None] | None = None
        self._start_failures = 0
        self._last_start_error: str | None = None

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def target_count(self) -> int:
        return self._target_count

    @property
    def max_num_speculative_tokens(self) -> int:
        config = self._config
        return config.speculation.reserved_speculative_tokens if config.drafter.enabled else 0

    def engines(self) -> Sequence[EngineHandle]:
        return [handle for handle in self._handles if handle.state is not EngineState.DEAD]

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
        while sum(h.state is EngineState.SERVING for h in self._handles) < self._target_count:
            if self._start_failures:
                error = self._last_start_error
                await self.close()
                raise EngineError(f"no engine could start: {error}")
            await asyncio.sleep(DRAIN_POLL_S)

    async def scale(self, count: int) -> None:
        limit = self._config.engine.max_count
        if count > limit:
            raise InvalidRequestError(
                f"count {count} is above engine.max_count {limit}", param="count"
            )
        logger.info("scaling engines from %d to %d", self._target_count, count)
        self._target_count = count
        self._start_failures = 0
        self._wake.set()

    def drain(self, engine_id: str, *, replace: bool) -> None:
        handle = self._find(engine_id)
        if handle.state is EngineState.DRAINING:
            return
        if handle.state not in DRAINABLE_STATES:
            raise ConflictError(
                f"engine {engine_id} is {handle.state.value} and cannot be drained now: try again "
                f"when it is serving, or remove it"
            )
        handle.begin_drain()
        self._spawn(self._drain(handle))
        self._gone(engine_id, "draining", replace)

    def remove(self, engine_id: str, *, replace: bool) -> None:
        handle = self._find(engine_id)
        was_counted = handle.state in LIVE_STATES
        handle.condemn("it was removed by request")
        self._gone(engine_id, "removing", replace or not was_counted)

    def _find(self, engine_id: str) -> RayEngineHandle:
        handles = {handle.engine_id: handle for handle in self._handles}
        handle = handles.get(engine_id)
        if handle is None or handle.state is EngineState.DEAD:
            raise UnknownResourceError(
                f"no engine {engine_id}; there are: {', '.join(handles) or 'none'}",
                param="engine_id",
            )
        return handle

    def _gone(self, engine_id: str, what: str, replace: bool) -> None:
        if not replace:
            self._target_count -= 1
        logger.info("%s %s by request; %d engines wanted", what, engine_id, self._target_count)
        self._wake.set()

    async def close(self) -> None:
        """Stop the loop, then every engine."""
        tasks = [*self._tasks] + ([self._reconciler] if self._reconciler else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(
            *(self._stop(handle, "server is shutting down") for handle in self._handles),
            return_exceptions=True,
        )
        self._handles.clear()

    async def _reconcile_forever(self) -> None:
        while True:
            self._reconcile()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RECONCILE_INTERVAL_S)
            self._wake.clear()

    def _reconcile(self) -> None:
        for handle in [h for h in self._handles if h.state is EngineState.DEAD]:
            logger.warning("engine %s is dead: %s", handle.engine_id, handle.error)
            self._handles.remove(handle)
            self._spawn(self._stop(handle, handle.error or "dead"))
        live = [handle for handle in self._handles if handle.state in LIVE_STATES]
        if len(live) < self._target_count and self._start_failures < MAX_START_FAILURES:
            for _ in range(self._target_count - len(live)):
                self._launch()
        # Newest first: the longest-serving engines hold the warmest caches. An engine in the
        # middle of a start or a commit is left alone until it has finished.
        for handle in reversed(live[self._target_count :]):
            if handle.state in DRAINABLE_STATES:
                handle.begin_drain()
                self._spawn(self._drain(handle))

    def _launch(self) -> None:
        index = self._free_index()
        config = self._config
        spec = EngineSpec(
            engine_id=f"engine-{next(self._indices)}",
            index=index,
            model=config.model,
            engine=config.engine,
            drafter=config.drafter,
            speculation=config.speculation,
            device=self._device,
        )
        handle = RayEngineHandle(spec, create_engine_actor(spec), config.weights)
        self._handles.append(handle)
        self._spawn(self._bring_up(handle))

    def _free_index(self) -> int:
        """Smallest index not in use, so that a replacement takes over the cores of the dead."""
        used = {handle.spec.index for handle in self._handles}
        return next(index for index in itertools.count() if index not in used)

    async def _bring_up(self, handle: RayEngineHandle) -> None:
        try:
            facts = await handle.start()
            if handle.footprint is not None:
                self._footprints.remember(handle.engine_id, handle.footprint)
            for preparation in self._prepare:
                await preparation(handle)
            if handle.state is EngineState.DEAD:
                raise EngineDeadError(f"engine {handle.engine_id} is dead: {handle.error}")
            handle.serve()
        except SlipstreamError as exc:
            if handle not in self._handles:
                return  # removed by request meanwhile, and stopped by the reconcile loop
            self._start_failures += 1
            self._last_start_error = exc.message
            logger.error("engine %s failed to start: %s", handle.engine_id, exc.message)
            await self._stop(handle, exc.message)
            await asyncio.sleep(BACKOFF_S * self._start_failures)
        else:
            self._start_failures = 0
            logger.info(
                "engine %s is serving after %.1f s: %d KV blocks of %d tokens, drafter %.1f MiB",
                handle.engine_id,
                facts.start_up_s,
                facts.num_kv_blocks,
                facts.block_size,
                facts.drafter_bytes / 2**20,
            )
        self._wake.set()

    async def _drain(self, handle: RayEngineHandle) -> None:
        """Wait for its last request, at most ``engine.drain_timeout_s``, then stop it."""
        deadline = asyncio.get_running_loop().time() + self._config.engine.drain_timeout_s
        with contextlib.suppress(SlipstreamError):
            while asyncio.get_running_loop().time() < deadline:
                status = await handle.status()
                if status.num_running_reqs + status.num_waiting_reqs == 0:
                    break
                await asyncio.sleep(DRAIN_POLL_S)
        if handle not in self._handles:
            return  # it died, or was removed: the reconcile loop stops it
        self._handles.remove(handle)
        await self._stop(handle, "drained")
        logger.info("engine %s drained and stopped", handle.engine_id)

    async def _stop(self, handle: RayEngineHandle, reason: str) -> None:
        await handle.stop(reason)
        self._footprints.forget(handle.engine_id)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("engine pool task failed", exc_info=task.exception())
