"""Runs one group on one engine: reserve, dispatch, release; the rest of it elsewhere when that dies
or is late with it.

Called by ``rollout_server/rollouts`` and the OpenAI-compatible routes; owns the dispatch queue and
the book of live requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic

from rollout_server.engine.protocol import (
    EngineHandle,
    EnginePool,
    GenerateDelta,
    GenerateRequest,
    GenerateResult,
)
from rollout_server.router.accounting import SampleAccounts
from rollout_server.router.circuit_breaker import BreakerLimits
from rollout_server.router.circuits import Circuits
from rollout_server.router.dispatch_queue import DispatchQueue
from rollout_server.router.generation_facts import GenerationFacts, StreamTimer
from rollout_server.router.group_attempt import attempt_group
from rollout_server.router.group_work import CompletionText, GroupWork
from rollout_server.router.live_group import LiveGroup, abort_on_engine
from rollout_server.router.progress_poller import ProgressPoller
from rollout_server.router.reservations import Reservations
from rollout_server.router.straggler_watch import StragglerWatch
from rollout_server.router.stragglers import StragglerLimits
from rollout_server.tracing import now_ns, record_spans
from shared.errors import EngineDeadError, EngineError, UnavailableError
from shared.logging import log_context

LOGGER = logging.getLogger(__name__)

NOTHING = GenerateResult(engine_id="", samples=[], generate_s=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedResult:
    """A finished group and what it went through."""

    result: GenerateResult
    queue_s: float
    """From the call to the last hand-over to an engine; includes attempts on engines that died."""
    num_attempts: int


class Router:
    """The only way from a request to an engine's ``generate``."""

    def __init__(
        self,
        pool: EnginePool,
        *,
        max_pending_samples: int,
        max_samples_per_engine: int,
        engine_wait_timeout_s: float,
        max_attempts: int,
        may_continue: bool = True,
        progress_interval_s: float = 1.0,
        completion_text: CompletionText = lambda prompt, token_ids: "",
        kv_cache_usage: Callable[[str], float] = lambda engine_id: 0.0,
        breaker: BreakerLimits | None = None,
        stragglers: StragglerLimits | None = None,
        on_generated: Callable[[GenerationFacts], None] = lambda facts: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.accounts = SampleAccounts(max_pending_samples)
        self.num_retries = 0
        self.num_kept_tokens = 0
        """Tokens of engines that died, delivered all the same."""
        self._max_attempts = max_attempts
        self._may_continue = may_continue
        self._completion_text = completion_text
        self._on_generated = on_generated
        self._clock = clock
        self._live: dict[str, LiveGroup] = {}
        self.circuits = Circuits(breaker, clock)
        self._queue = DispatchQueue(
            pool,
            max_samples_per_engine=max_samples_per_engine,
            engine_wait_timeout_s=engine_wait_timeout_s,
            kv_cache_usage=kv_cache_usage,
            circuits=self.circuits,
            clock=clock,
        )
        self._reservations = Reservations(self._queue, self.circuits, clock)
        self._progress = ProgressPoller(self._live.values, progress_interval_s, self._has_tokens)
        self.stragglers = StragglerWatch(
            stragglers, self._queue, self._live.values, progress_interval_s, clock
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the background loops."""
        self._tasks.append(asyncio.create_task(self._queue.run(), name="router-queue"))
        self._tasks.append(asyncio.create_task(self._progress.run(), name="router-progress"))
        self._tasks.append(asyncio.create_task(self.stragglers.run(), name="router-stragglers"))

    async def close(self) -> None:
        """Fail what waits and stop. Running groups are their callers' to end. Idempotent."""
        self._queue.fail_all(UnavailableError("the server is shutting down"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def wake(self) -> None:
        """Tell the queue that an engine may have joined or changed state."""
        self._queue.wake()

    def num_reserved(self, engine_id: str) -> int:
        """Samples handed to ``engine_id`` and not had back."""
        return self._queue.num_reserved(engine_id)

    @property
    def num_queued_samples(self) -> int:
        """Samples that wait for an engine."""
        return self._queue.num_queued_samples

    @property
    def longest_wait_s(self) -> float:
        """How long the group at the head of the queue has waited."""
        return self._queue.longest_wait_s

    async def generate(
        self, request: GenerateRequest, *, num_wanted: int | None = None
    ) -> RoutedResult:
        """All samples of one prompt, from one engine; the rest of them from another when it dies,
        or when it is late with them and the router may move them.

        An aborted request returns what there is; samples that never started are empty.

        Args:
            num_wanted: return these many that finish first, and end the others.

        Raises:
            EngineDeadError: every one of ``max_attempts`` engines died.
            EngineError: the engine failed on this request.
            UnavailableError: no engine within ``server.engine_wait_timeout_s``.
        """
        accepted_s, accepted_ns = self._clock(), now_ns()
        work = GroupWork(
            request,
            self._completion_text,
            may_continue=self._may_continue,
            num_wanted=num_wanted,
        )
        with self._registered(request, work) as live:
            attempt = 1
            while True:
                async with self._reservations.hold(live, work.num_unfinished) as handle:
                    queue_s = self._clock() - accepted_s
                    last = NOTHING
                    if handle is None:
                        work.end_as_aborted()
                    else:
                        try:
                            last = await attempt_group(handle, work, live)
                        except EngineError as exc:
                            self._start_over(handle, live, work, attempt, exc)
                            if work.num_unfinished:
                                attempt += 1
                                self.num_retries += 1
                                continue
                            last = replace(NOTHING, engine_id=handle.engine_id)
                        else:
                            if work.num_unfinished and not self._settled(live, work):
                                work.engine_left()
                                self.stragglers.group_left(work)
                                continue
                            self._report(GenerationFacts.of(last, queue_s), accepted_ns)
                            if not live.is_aborted:
                                self.stragglers.group_finished(live)
                    result = replace(last, samples=work.samples())
                    return RoutedResult(result=result, queue_s=queue_s, num_attempts=attempt)

    def _start_over(
        self,
        handle: EngineHandle,
        live: LiveGroup,
        work: GroupWork,
        attempt: int,
        exc: EngineError,
    ) -> None:
        """Get a group ready for another engine; nothing is unfinished if it needs none.

        Raises:
            EngineError: it must not be tried again.
        """
        if isinstance(exc, EngineDeadError):
            self._note_death(handle, live.request, attempt, exc)
        elif not self._reservations.probe_failed(live, exc):
            raise exc
        work.engine_died()
        self.num_kept_tokens += work.num_kept_tokens
        if not self._settled(live, work) and work.num_unfinished and attempt == self._max_attempts:
            raise exc

    def _settled(self, live: LiveGroup, work: GroupWork) -> bool:
        """Whether nobody wants what is unfinished; it ends with what there is."""
        if live.is_aborted or work.has_enough:
            work.end_as_aborted()
            return True
        return False

    def _has_tokens(self, live: LiveGroup) -> None:
        if live.placement is not None:
            self.circuits.progressed(live.placement.ticket)

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateDelta, None]:
        """Deltas of one prompt as they are sampled.

        An engine that dies before its first delta is replaced by another; afterwards its death
        ends the stream, because what was sent cannot be taken back. Closing the iterator early
        aborts the request on the engine.

        Raises:
            as ``generate``.
        """
        accepted_s, accepted_ns = self._clock(), now_ns()
        with self._registered(request, None) as live:
            live.request_ids = (request.request_id,)
            for attempt in range(1, self._max_attempts + 1):
                async with self._reservations.hold(live, request.n) as handle:
                    if handle is None:
                        return
                    started = False
                    completed = False
                    queue_s = self._clock() - accepted_s
                    timer = StreamTimer(self._clock)
                    try:
                        async for delta in handle.generate_stream(request):
                            if not started:
                                self._has_tokens(live)
                            started = True
                            timer.note(delta)
                            yield delta
                        completed = True
                        self._report(timer.facts(handle.engine_id, queue_s), accepted_ns)
                        return
                    except EngineDeadError as exc:
                        completed = True
                        self._note_death(handle, request, attempt, exc)
                        if started or live.is_aborted or attempt == self._max_attempts:
                            raise
                        self.num_retries += 1
                    finally:
                        if not completed:
                            await abort_on_engine(handle, live)

    async def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are ignored. Safe to repeat."""
        live = self._live.get(request_id)
        if live is None:
            return
        live.is_aborted = True
        if not self._queue.withdraw(request_id) and live.handle is not None:
            await abort_on_engine(live.handle, live)

    def _report(self, facts: GenerationFacts, accepted_ns: int) -> None:
        self._on_generated(facts)
        record_spans(facts.span_durations_s(), accepted_ns, engine_id=facts.engine_id)

    @contextmanager
    def _registered(self, request: GenerateRequest, work: GroupWork | None) -> Iterator[LiveGroup]:
        assert request.request_id not in self._live, f"{request.request_id} is already live"
        live = LiveGroup(request=request, work=work)
        self._live[request.request_id] = live
        try:
            yield live
        finally:
            self._reservations.drop_ahead(live)
            del self._live[request.request_id]

    def _note_death(
        self, handle: EngineHandle, request: GenerateRequest, attempt: int, exc: EngineDeadError
    ) -> None:
        self._queue.mark_dead(handle.engine_id)
        with log_context(group_id=request.request_id, engine_id=handle.engine_id):
            LOGGER.warning(
                "engine %s died under %s (attempt %d of %d): %s",
                handle.engine_id,
                request.request_id,
                attempt,
                self._max_attempts,
                exc.message,
            )
