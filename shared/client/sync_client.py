"""The blocking client.

What is repeated: no connection, a broken one, silence, 429 and 503 (honouring ``Retry-After``).
Repeating is safe: rollouts carry a ``request_id``, to which the server attaches instead of starting
another, and the rest sets what it names. Any other 4xx or 5xx is raised at once: it would fail
again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import httpx

from shared.client import calls
from shared.client.attempts import Attempts
from shared.client.bodies import AnswerT
from shared.client.calls import Call
from shared.client.connection import Connection, Endpoint
from shared.client.control import ControlCalls
from shared.client.failures import Wording
from shared.client.headers import WireFormat
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

DEFAULT_TIMEOUT_S = 600.0


class RolloutClient(ControlCalls):
    """One server, one pool of connections. Safe to use from several threads.

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
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], object] = sleep,
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
        self._connection = Connection(endpoint, transport)
        self._pause = pause
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def stream_groups(
        self, request: RolloutRequest, on_progress: ProgressCallback | None = None
    ) -> Iterator[RolloutGroup]:
        """Groups as they finish, each prompt's once, however often the stream breaks.

        The request needs a ``request_id`` of its own (``rollout_request`` makes one). Leaving the
        iteration leaves the request running on the server; ``abort`` ends it.
        """
        yield from self._groups(request, RolloutTracker(request, on_progress))

    def rollout(
        self, request: RolloutRequest, on_progress: ProgressCallback | None = None
    ) -> RolloutResponse:
        """Every group, in the order of the prompts."""
        tracker = RolloutTracker(request, on_progress)
        return tracker.response(list(self._groups(request, tracker)))

    def result(self, request_id: str) -> RolloutResponse:
        """The result of a request that was sent before, perhaps by a process that is gone.

        Waits while it runs, for as long as groups finish.

        Raises:
            UnknownResourceError: the server does not know it, or keeps it no longer.
            SlipstreamError: the request failed; its error.
        """
        call = calls.fetch_rollout(request_id)
        wait = FetchWait(self._attempts(call))
        while True:
            response = wait.check(self._run(call))
            if response is not None:
                return response
            if self._pause(FETCH_INTERVAL_S) is True:
                raise stopped(call.what)

    def abort(self, request_id: str) -> bool:
        """End a request; its stream then ends with what there is. False when it is not known.

        One attempt.
        """
        try:
            self._connection.send(calls.abort_rollout(request_id))
        except UnknownResourceError:
            return False
        return True

    def publish(
        self, request: PublishRequest, *, answer_timeout_s: float = math.inf
    ) -> PublishResponse:
        """Announce a segment; returns when every serving engine has the version.

        Args:
            answer_timeout_s: after so long without an answer the same push is sent again.
        """
        return self._run(calls.publish(request, answer_timeout_s))

    def publish_weights(
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
            base_version = self.weights().committed_version
        started_s = self._clock()
        request = write_push(
            tensors, version=version, base_version=base_version, dtype=dtype, directory=directory
        )
        try:
            # Repeated where no answer comes. A conflict is never about that: the server answers
            # these tensors under this version again, so somebody else's are committed.
            answer = self._run(calls.publish(request, math.inf))
        finally:
            remove_push(request, directory)
        return WeightPush.of(request, answer, push_s=self._clock() - started_s)

    def wait_until_ready(self) -> None:
        """Return when an engine takes requests."""
        self._run(calls.readiness())

    def _groups(self, request: RolloutRequest, tracker: RolloutTracker) -> Iterator[RolloutGroup]:
        call = calls.stream_rollouts(request)
        attempts = self._attempts(call)
        while True:
            try:
                for line in self._connection.lines(call):
                    group = tracker.take(line)
                    if group is not None:  # one that comes again is no progress
                        attempts.progressed()
                        yield group
                        attempts.progressed()  # what the caller does meanwhile is not waiting
                return
            except UnavailableError as exc:
                self._wait_after(exc, attempts, call.what)

    def _run(self, call: Call[AnswerT], attempts: Attempts | None = None) -> AnswerT:
        attempts = attempts or self._attempts(call)
        while True:
            try:
                return self._connection.send(call)
            except UnavailableError as exc:
                self._wait_after(exc, attempts, call.what)

    def _wait_after(self, error: UnavailableError, attempts: Attempts, what: str) -> None:
        delay_s = attempts.delay_after(error)
        LOGGER.warning("%s: %s; next attempt in %.2f s", what, error.message, delay_s)
        if self._pause(delay_s) is True:
            raise error

    def _attempts(self, call: Call[AnswerT]) -> Attempts:
        endpoint = self._connection.endpoint
        return Attempts(
            call.what,
            timeout_s=endpoint.timeout_s,
            timeout_setting=endpoint.wording.timeout_setting,
            clock=self._clock,
        )
