"""Rollout requests that run beside the loop, each followed to its end by a thread of its own.

::

    RUNNING ─► FINISHED    every group is here
       ├─────► FAILED      the error is raised where the request is waited for
       └─────► ABORTED     we ended it: whatever still comes is dropped

``Sampler.close`` ends them all, also on the server, and waits for the threads: no request outlives
the loop that made it, and no thread does but one whose server neither answers nor breaks off.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum

from shared.clock import Clock
from shared.errors import SlipstreamError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

NEWS_TIMEOUT_S = 0.25
"""How soon a wait sees a stop; groups and ends are seen at once."""
ABORT_REPEAT_S = 1.0
CLOSE_TIMEOUT_S = 30.0
"""How long the threads of aborted requests may take to end."""


class RequestState(StrEnum):
    """Where a request is."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


REQUEST_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.RUNNING: frozenset(
        {RequestState.FINISHED, RequestState.FAILED, RequestState.ABORTED}
    ),
    RequestState.FINISHED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.ABORTED: frozenset(),
}

OnGroup = Callable[[RolloutGroup], None]
Within = Callable[[], AbstractContextManager[None]]


class SamplingRequest:
    """One request. Its thread writes; anybody may read and ``abort``."""

    def __init__(
        self,
        client: RolloutClient,
        request: RolloutRequest,
        clock: Clock,
        on_group: OnGroup,
        within: Within,
    ) -> None:
        self.request = request
        self.request_id = str(request.request_id)
        self.groups: list[RolloutGroup] = []
        """In order of finishing."""
        self.error: Exception | None = None
        self.asked_s = clock.monotonic_s()
        self.ended_s = self.asked_s
        self._client = client
        self._clock = clock
        self._on_group = on_group
        self._within = within
        self._state = RequestState.RUNNING
        self._news = threading.Condition()
        # A daemon: a thread that hangs in a read must not keep a finished trainer alive.
        self._thread = threading.Thread(
            target=self._follow, name=f"rollouts {self.request_id}", daemon=True
        )
        self._thread.start()

    @property
    def state(self) -> RequestState:
        """Where it is now."""
        with self._news:
            return self._state

    def wait_for_news(self, num_groups: int, timeout_s: float) -> None:
        """Return when it has ended or has more than ``num_groups`` groups, or after the time."""
        with self._news:
            self._news.wait_for(
                lambda: self._state is not RequestState.RUNNING or len(self.groups) > num_groups,
                timeout_s,
            )

    def abort(self) -> None:
        """End it, here and on the server, which is told again by every call until it has ended."""
        with self._news:
            if self._state is RequestState.RUNNING:
                self._enter(RequestState.ABORTED)
            is_aborted = self._state is RequestState.ABORTED
        if is_aborted and self._thread.is_alive():
            self._abort_on_server()

    def join(self, timeout_s: float) -> bool:
        """Whether its thread has ended, after waiting at most so long."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _follow(self) -> None:
        try:
            with self._within():
                for group in self._client.stream_groups(self.request):
                    self._take(group)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the loop has to hear of it
            self._end(RequestState.FAILED, exc)
        else:
            self._end(RequestState.FINISHED)

    def _take(self, group: RolloutGroup) -> None:
        if self.state is RequestState.ABORTED:
            # Again: the first abort may have come before the request was on the server.
            self._abort_on_server()
            return
        self._on_group(group)
        with self._news:
            self.groups.append(group)
            self._news.notify_all()

    def _end(self, state: RequestState, error: Exception | None = None) -> None:
        with self._news:
            if self._state is RequestState.RUNNING:
                self.error = error
                self.ended_s = self._clock.monotonic_s()
                self._enter(state)

    def _enter(self, state: RequestState) -> None:
        assert state in REQUEST_TRANSITIONS[self._state]
        self._state = state
        self._news.notify_all()

    def _abort_on_server(self) -> None:
        try:
            self._client.abort(self.request_id)
        except SlipstreamError as exc:
            LOGGER.warning("rollouts %s could not be aborted: %s", self.request_id, exc.message)


class Sampler:
    """Starts requests, waits for them, and ends what is left."""

    def __init__(self, client: RolloutClient, stop: threading.Event, clock: Clock) -> None:
        """
        Args:
            stop: ends every wait; the client's retries should end with it too.
        """
        self._client = client
        self._stop = stop
        self._clock = clock
        self._lock = threading.Lock()
        self._requests: list[SamplingRequest] = []

    def start(
        self, request: RolloutRequest, on_group: OnGroup, *, within: Within = nullcontext
    ) -> SamplingRequest:
        """Begin a request.

        Args:
            on_group: called in the request's thread with each group, before it is counted.
            within: entered there around the whole request.
        """
        started = SamplingRequest(self._client, request, self._clock, on_group, within)
        with self._lock:
            self._requests = [known for known in self._requests if not known.join(0)]
            self._requests.append(started)
        return started

    def wait(self, request: SamplingRequest, on_news: Callable[[int], None]) -> bool:
        """Until every group is there; False when a stop came first.

        Args:
            on_news: called with the number of groups so far, whenever that may have changed.

        Raises:
            Exception: why the request failed.
        """
        while not self._stop.is_set():
            state, num_groups = request.state, len(request.groups)
            on_news(num_groups)
            if state is RequestState.FINISHED:
                return True
            if state is RequestState.FAILED and not self._stop.is_set():
                assert request.error is not None
                raise request.error
            if state is not RequestState.RUNNING:
                return False  # a stop ended it, or made it give up
            request.wait_for_news(num_groups, NEWS_TIMEOUT_S)
        return False

    def abort_all(self) -> None:
        """End every running request. From any thread, any number of times."""
        with self._lock:
            requests = list(self._requests)
        for request in requests:
            request.abort()

    def close(self) -> None:
        """End every running request and its thread."""
        deadline_s = self._clock.monotonic_s() + CLOSE_TIMEOUT_S
        with self._lock:
            left, self._requests = self._requests, []
        while left and self._clock.monotonic_s() < deadline_s:
            for request in left:
                request.abort()
            left = [request for request in left if not request.join(ABORT_REPEAT_S)]
        if left:
            LOGGER.warning(
                "rollouts %s were aborted %g s ago and their answers have not ended; the trainer "
                "ends without them",
                ", ".join(request.request_id for request in left),
                CLOSE_TIMEOUT_S,
            )
