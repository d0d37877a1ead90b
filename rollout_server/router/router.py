"""Runs one group on one engine: reserve, dispatch, release, and again when the engine dies.

Called by ``rollout_server/rollouts`` and the OpenAI-compatible routes; owns the dispatch queue and
the book of live requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from time import monotonic

from rollout_server.engine.protocol import (
    EngineHandle,
    EnginePool,
    GenerateDelta,
    GeneratedSample,
    GenerateRequest,
    GenerateResult,
)
from rollout_server.router.accounting import SampleAccounts
from rollout_server.router.dispatch_queue import DispatchQueue
from rollout_server.router.generation_facts import GenerationFacts, StreamTimer
from rollout_server.tracing import now_ns, record_spans
from shared.errors import EngineDeadError, EngineError, UnavailableError
from shared.logging import log_context
from shared.types import FinishReason

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedResult:
    """A finished group and what it went through."""

    result: GenerateResult
    queue_s: float
    """From the call to the last hand-over to an engine; includes attempts on engines that died."""
    num_attempts: int


@dataclass(kw_only=True, slots=True)
class _LiveRequest:
    handle: EngineHandle | None = None
    aborted: bool = False


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
        kv_cache_usage: Callable[[str], float] = lambda engine_id: 0.0,
        on_generated: Callable[[GenerationFacts], None] = lambda facts: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.accounts = SampleAccounts(max_pending_samples)
        self.num_retries = 0
        self._max_attempts = max_attempts
        self._on_generated = on_generated
        self._clock = clock
        self._live: dict[str, _LiveRequest] = {}
        self._queue = DispatchQueue(
            pool,
            max_samples_per_engine=max_samples_per_engine,
            engine_wait_timeout_s=engine_wait_timeout_s,
            kv_cache_usage=kv_cache_usage,
            clock=clock,
        )
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the background loop of the queue."""
        self._loop_task = asyncio.create_task(self._queue.run(), name="router-queue")

    async def close(self) -> None:
        """Fail what waits and stop. Running groups are their callers' to end. Idempotent."""
        self._queue.fail_all(UnavailableError("the server is shutting down"))
        if self._loop_task is not None:
            self._loop_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop_task
            self._loop_task = None

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

    async def generate(self, request: GenerateRequest) -> RoutedResult:
        """All samples of one prompt, from one engine.

        An aborted request returns what there is; samples that never started are empty.

        Raises:
            EngineDeadError: every one of ``max_attempts`` engines died.
            EngineError: the engine failed on this request.
            UnavailableError: no engine within ``server.engine_wait_timeout_s``.
        """
        accepted_s, accepted_ns = self._clock(), now_ns()
        with self._registered(request) as live:
            for attempt in range(1, self._max_attempts + 1):
                async with self._reserved(request, live) as handle:
                    queue_s = self._clock() - accepted_s
                    if handle is None:
                        result = aborted_result(request)
                    else:
                        try:
                            with log_context(engine_id=handle.engine_id):
                                result = await handle.generate(request)
                            self._report(GenerationFacts.of(result, queue_s), accepted_ns)
                        except asyncio.CancelledError:
                            # Nobody wants the answer any more: stop the engine working on it.
                            await self._abort_on(handle, request.request_id)
                            raise
                        except EngineDeadError as exc:
                            self._note_death(handle, request, attempt, exc)
                            if not live.aborted:
                                if attempt == self._max_attempts:
                                    raise
                                self.num_retries += 1
                                continue
                            result = aborted_result(request)
                    return RoutedResult(result=result, queue_s=queue_s, num_attempts=attempt)
        raise AssertionError("max_attempts is at least 1")

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
        with self._registered(request) as live:
            for attempt in range(1, self._max_attempts + 1):
                async with self._reserved(request, live) as handle:
                    if handle is None:
                        return
                    started = False
                    completed = False
                    queue_s = self._clock() - accepted_s
                    timer = StreamTimer(self._clock)
                    try:
                        async for delta in handle.generate_stream(request):
                            started = True
                            timer.note(delta)
                            yield delta
                        completed = True
                        self._report(timer.facts(handle.engine_id, queue_s), accepted_ns)
                        return
                    except EngineDeadError as exc:
                        completed = True
                        self._note_death(handle, request, attempt, exc)
                        if started or live.aborted or attempt == self._max_attempts:
                            raise
                        self.num_retries += 1
                    finally:
                        if not completed:
                            await self._abort_on(handle, request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are ignored. Safe to repeat."""
        live = self._live.get(request_id)
        if live is None:
            return
        live.aborted = True
        if not self._queue.withdraw(request_id) and live.handle is not None:
            await self._abort_on(live.handle, request_id)

    def _report(self, facts: GenerationFacts, accepted_ns: int) -> None:
        self._on_generated(facts)
        record_spans(facts.span_durations_s(), accepted_ns, engine_id=facts.engine_id)

    @contextmanager
    def _registered(self, request: GenerateRequest) -> Iterator[_LiveRequest]:
        assert request.request_id not in self._live, f"{request.request_id} is already live"
        live = _LiveRequest()
        self._live[request.request_id] = live
        try:
            yield live
        finally:
            del self._live[request.request_id]

    @asynccontextmanager
    async def _reserved(
        self, request: GenerateRequest, live: _LiveRequest
    ) -> AsyncIterator[EngineHandle | None]:
        """Yields an engine with the samples reserved on it, or None for an aborted request."""
        handle = None if live.aborted else await self._queue.acquire(request.request_id, request.n)
        if handle is None:
            yield None
            return
        live.handle = handle
        try:
            # An abort may have come between the reservation and this task's turn.
            yield None if live.aborted else handle
        finally:
            live.handle = None
            self._queue.release(handle.engine_id, request.n)

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

    @staticmethod
    async def _abort_on(handle: EngineHandle, request_id: str) -> None:
        try:
            await handle.abort(request_id)
        except EngineError as exc:
            # Its generate call ends with the same trouble; there is nobody else to tell.
            with log_context(group_id=request_id, engine_id=handle.engine_id):
                LOGGER.warning(
                    "abort of %s on %s failed: %s", request_id, handle.engine_id, exc.message
                )


def aborted_result(request: GenerateRequest) -> GenerateResult:
    """What a request returns that was aborted before any engine began it: ``n`` empty samples."""
    samples = [
        GeneratedSample(
            sample_index=index,
            token_ids=[],
            logprobs=[],
            text="",
            finish_reason=FinishReason.ABORT,
            weight_versions=[],
            num_draft_tokens=0,
            num_accepted_tokens=0,
        )
        for index in range(request.n)
    ]
    return GenerateResult(engine_id="", samples=samples, generate_s=0.0)
