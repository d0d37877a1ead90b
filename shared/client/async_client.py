"""``sync_client`` for programs that run an event loop: the same methods, the same retries."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from time import monotonic
from types import TracebackType
from typing import Self

import httpx

from shared.client import calls
from shared.client.async_connection import AsyncConnection
from shared.client.attempts import Attempts
from shared.client.bodies import AnswerT
from shared.client.calls import Call
from shared.client.connection import Endpoint
from shared.client.control import AsyncControlCalls
from shared.client.failures import Wording
from shared.client.headers import WireFormat
from shared.client.sync_client import DEFAULT_TIMEOUT_S
from shared.client.tracking import ProgressCallback, RolloutTracker
from shared.client.waiting import FETCH_INTERVAL_S, FetchWait, stopped
from shared.client.weight_push import (
    DEFAULT_DIRECTORY,
    Tensor,
    WeightPush,
    remove_push,
    write_push,
)
from shared.credentials import ClientCredentials
from shared.errors import UnavailableError, UnknownResourceError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, RolloutResponse
from shared.schemas.weights import PublishRequest, PublishResponse

LOGGER = logging.getLogger(__name__)


class AsyncRolloutClient(AsyncControlCalls):
    """One server, one pool of connections. For one event loop.

    Every method raises ``UnavailableError`` when the server stayed away longer than ``timeout_s``,
    ``RequestError`` for a 4xx and ``SlipstreamError`` for any other failure.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        credentials: ClientCredentials | None = None,
        wire_format: WireFormat = WireFormat.AUTO,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = monotonic,
        wording: Wording | None = None,
    ) -> None:
        """
        Args:
            timeout_s: longest wait without any progress.
            api_key: sent as ``Authorization: Bearer``.
            credentials: a key and whom to trust for TLS (``shared.credentials``); or ``api_key``.
            pause: waits the given seconds; returning True (an event that was set) ends the retries.
            wording: what messages call the settings of whoever made this client.
        """
        endpoint = Endpoint(
            url,
            timeout_s=timeout_s,
            credentials=credentials or ClientCredentials(api_key=api_key),
            wire_format=wire_format,
            wording=wording,
        )
        self.url = endpoint.url
        self._connection = AsyncConnection(endpoint, transport)
        self._pause = pause
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def stream_groups(
        self, request: RolloutRequest, on_progress: ProgressCallback | None = None
    ) -> AsyncGenerator[RolloutGroup, None]:
        """Groups as they finish, each prompt's once, however often the stream breaks.

        The request needs a ``request_id`` of its own (``rollout_request`` makes one). Leaving the
        iteration leaves the request running on the server; ``abort`` ends it.
        """
        async with aclosing(self._groups(request, RolloutTracker(request, on_progress))) as groups:
            async for group in groups:
                yield group

    async def rollout(
        self, request: RolloutRequest, on_progress: ProgressCallback | None = None
    ) -> RolloutResponse:
        """Every group, in the order of the prompts."""
        tracker = RolloutTracker(request, on_progress)
        return tracker.response([group async for group in self._groups(request, tracker)])

    async def result(self, request_id: str) -> RolloutResponse:
        """The result of a request that was sent before, perhaps by a process that is gone.

        Waits while it runs, for as long as groups finish.

        Raises:
            UnknownResourceError: the server does not know it, or keeps it no longer.
            SlipstreamError: the request failed; its error.
        """
        call = calls.fetch_rollout(request_id)
        wait = FetchWait(self._attempts(call))
        while True:
            response = wait.check(await self._run(call))
            if response is not None:
                return response
            if await self._pause(FETCH_INTERVAL_S) is True:
                raise stopped(call.what)

    async def abort(self, request_id: str) -> bool:
        """End a request; its stream then ends with what there is. False when it is not known.

        One attempt.
        """
        try:
            await self._connection.send(calls.abort_rollout(request_id))
        except UnknownResourceError:
            return False
        return True

    async def publish(
        self, request: PublishRequest, *, answer_timeout_s: float = math.inf
    ) -> PublishResponse:
        """Announce a segment; returns when every serving engine has the version.

        Args:
            answer_timeout_s: after so long without an answer the same push is sent again.
        """
        return await self._run(calls.publish(request, answer_timeout_s))

    async def publish_weights(
        self,
        tensors: Mapping[str, Tensor],
        *,
        version: int,
        base_version: int | None = None,
        dtype: str | None = None,
        directory: str = DEFAULT_DIRECTORY,
    ) -> WeightPush:
        """Push a whole model through shared memory, from numpy arrays or torch tensors.

        Args:
            tensors: by the names the model has on the server; tied tensors once.
            base_version: the committed version this one is built on; the server's by default.
            dtype: round floating-point tensors to ``bfloat16``, ``float16`` or ``float32``.
            directory: the server's ``weights.shared_memory_dir``.

        Raises:
            WeightTransferError: the segment cannot be written, or the push was taken back.
            ConflictError: another trainer's push came first; its version may be the same.
            RequestError: the server refused it; what was committed still serves.
        """
        if base_version is None:
            base_version = (await self.weights()).committed_version
        started_s = self._clock()
        writing = asyncio.ensure_future(
            asyncio.to_thread(
                write_push,
                tensors,
                version=version,
                base_version=base_version,
                dtype=dtype,
                directory=directory,
            )
        )
        try:
            request = await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The thread cannot be stopped; what it writes must not stay in memory.
            writing.add_done_callback(lambda done: _remove_written(done, directory))
            raise
        try:
            # Repeated where no answer comes. A conflict is never about that: the server answers
            # these tensors under this version again, so somebody else's are committed.
            answer = await self._run(calls.publish(request, math.inf))
        finally:
            remove_push(request, directory)
        return WeightPush.of(request, answer, push_s=self._clock() - started_s)

    async def wait_until_ready(self) -> None:
        """Return when an engine takes requests."""
        await self._run(calls.readiness())

    async def _groups(
        self, request: RolloutRequest, tracker: RolloutTracker
    ) -> AsyncGenerator[RolloutGroup, None]:
        call = calls.stream_rollouts(request)
        attempts = self._attempts(call)
        while True:
            try:
                async with aclosing(self._connection.lines(call)) as lines:
                    async for line in lines:
                        group = tracker.take(line)
                        if group is not None:  # one that comes again is no progress
                            attempts.progressed()
                            yield group
                            attempts.progressed()  # what the caller does is not waiting
                return
            except UnavailableError as exc:
                await self._wait_after(exc, attempts, call.what)

    async def _run(self, call: Call[AnswerT], attempts: Attempts | None = None) -> AnswerT:
        attempts = attempts or self._attempts(call)
        while True:
            try:
                return await self._connection.send(call)
            except UnavailableError as exc:
                await self._wait_after(exc, attempts, call.what)

    async def _wait_after(self, error: UnavailableError, attempts: Attempts, what: str) -> None:
        delay_s = attempts.delay_after(error)
        LOGGER.warning("%s: %s; next attempt in %.2f s", what, error.message, delay_s)
        if await self._pause(delay_s) is True:
            raise error

    def _attempts(self, call: Call[AnswerT]) -> Attempts:
        endpoint = self._connection.endpoint
        return Attempts(
            call.what,
            timeout_s=endpoint.timeout_s,
            timeout_setting=endpoint.wording.timeout_setting,
            clock=self._clock,
        )


def _remove_written(writing: asyncio.Future[PublishRequest], directory: str) -> None:
    if not writing.cancelled() and writing.exception() is None:
        remove_push(writing.result(), directory)
