"""The trainer's HTTP client of the rollout server: streams of groups, pushes, status.

What is retried: no connection, a broken stream, 429 and 503 (honouring ``Retry-After``), always
with the same ``request_id``, so that the server attaches to the running request instead of starting
another. Any other 4xx or 5xx is raised at once: it would fail again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from shared.cli.api_client import error_from_response
from shared.credentials import ClientCredentials, is_untrusted_certificate
from shared.errors import SlipstreamError, UnavailableError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, StreamLine
from shared.schemas.speculation import SpeculationResponse
from shared.schemas.weights import PublishRequest, PublishResponse, WeightsResponse

LOGGER = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 60.0
POOL_TIMEOUT_S = 10.0
STATUS_TIMEOUT_S = 10.0
"""For small answers; the control plane must not hang on a busy data plane."""
FIRST_RETRY_DELAY_S = 0.25
MAX_RETRY_DELAY_S = 8.0

_Response = TypeVar("_Response", bound=BaseModel)
_Result = TypeVar("_Result")


class RolloutClient:
    """One server, one pool of connections. Safe to use from several threads.

    Every method raises ``UnavailableError`` when the server stayed away longer than ``timeout_s``,
    ``RequestError`` for a 4xx and ``SlipstreamError`` for any other failure.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        credentials: ClientCredentials | None = None,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], object] = sleep,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """
        Args:
            timeout_s: longest wait without any progress (``trainer.api_timeout_s``).
            credentials: API key and certificates, for a server that wants them.
            pause: waits the given seconds; returning True (an event that was set) ends the retries.
        """
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._pause = pause
        self._clock = clock
        credentials = credentials or ClientCredentials()
        self._http = httpx.Client(
            base_url=self.url,
            headers=credentials.headers(),
            verify=credentials.verification(),
            transport=transport,
            timeout=self._timeout(timeout_s),
        )

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
        self._http.close()

    def stream_groups(self, request: RolloutRequest) -> Iterator[RolloutGroup]:
        """Groups as they finish, each prompt's once, however often the stream breaks.

        The request needs a ``request_id`` of its own. Ends when the server says done.
        """
        if request.request_id is None or not request.stream:
            raise ValueError("stream_groups needs a request with a request_id and stream true")
        body = request.model_dump_json(exclude_none=True).encode()
        seen: set[int] = set()
        attempts = _Attempts(self, f"rollouts {request.request_id}")
        while True:
            try:
                for line in self._stream_once(body):
                    attempts.progressed()
                    if line.group is not None and line.group.prompt_index not in seen:
                        seen.add(line.group.prompt_index)
                        yield line.group
                return
            except UnavailableError as exc:
                attempts.wait_before_next(exc)

    def abort(self, request_id: str) -> None:
        """Ask the server to end a request; its stream then ends with what there is."""
        with _mapped(self.url, "DELETE rollouts"):
            response = self._http.delete(f"/v1/rollouts/{request_id}", timeout=STATUS_TIMEOUT_S)
            if response.status_code >= 400 and response.status_code != httpx.codes.NOT_FOUND:
                raise error_from_response(response)

    def publish(
        self, request: PublishRequest, *, answer_timeout_s: float = math.inf
    ) -> PublishResponse:
        """Push a version; returns when every serving engine has it.

        Args:
            answer_timeout_s: after so long without an answer the same push is sent again, which
                finds the first one running or committed.
        """
        body = request.model_dump_json().encode()
        timeout = self._timeout(min(answer_timeout_s, self._timeout_s))
        return self._with_retries(
            f"push of version {request.version}",
            lambda: self._send("POST", "/v1/weights", PublishResponse, body=body, timeout=timeout),
        )

    def weights(self) -> WeightsResponse:
        """Which version is committed."""
        return self._with_retries(
            "weight status",
            lambda: self._send("GET", "/v1/weights", WeightsResponse, timeout=STATUS_TIMEOUT_S),
        )

    def speculation(self, since_step: int) -> SpeculationResponse:
        """Decisions of every engine after ``since_step``. One attempt: pollers come again."""
        path = f"/v1/speculation?since_step={since_step}"
        return self._send("GET", path, SpeculationResponse, timeout=STATUS_TIMEOUT_S)

    def wait_until_ready(self) -> None:
        """Return when ``/readyz`` answers 200."""

        def ask() -> None:
            with _mapped(self.url, "GET /readyz"):
                response = self._http.get("/readyz", timeout=STATUS_TIMEOUT_S)
                if response.status_code >= 400:
                    raise error_from_response(response)

        self._with_retries("server to be ready", ask)

    def _stream_once(self, body: bytes) -> Iterator[StreamLine]:
        with (
            _mapped(self.url, "POST /v1/rollouts"),
            self._http.stream(
                "POST", "/v1/rollouts", content=body, headers=_JSON_HEADERS
            ) as response,
        ):
            if response.status_code >= 400:
                response.read()
                raise error_from_response(response)
            for text in response.iter_lines():
                if not text.strip():
                    continue
                line = StreamLine.model_validate_json(text)
                if line.type == "error":
                    detail = line.error
                    message = "no reason given" if detail is None else detail.message
                    raise SlipstreamError(f"the server gave up on the rollouts: {message}")
                yield line
                if line.type == "done":
                    return
        raise UnavailableError(f"{self.url} closed the stream before the rollouts were done")

    def _send(
        self,
        method: str,
        path: str,
        response_model: type[_Response],
        *,
        body: bytes | None = None,
        timeout: httpx.Timeout | float,
    ) -> _Response:
        with _mapped(self.url, f"{method} {path}"):
            response = self._http.request(
                method,
                path,
                content=body,
                headers=_JSON_HEADERS,
                timeout=timeout,
            )
            if response.status_code >= 400:
                raise error_from_response(response)
            return response_model.model_validate_json(response.content)

    def _timeout(self, read_s: float) -> httpx.Timeout:
        return httpx.Timeout(
            connect=min(CONNECT_TIMEOUT_S, self._timeout_s),
            read=read_s,
            write=min(WRITE_TIMEOUT_S, self._timeout_s),
            pool=min(POOL_TIMEOUT_S, self._timeout_s),
        )

    def _with_retries(self, what: str, call: Callable[[], _Result]) -> _Result:
        attempts = _Attempts(self, what)
        while True:
            try:
                return call()
            except UnavailableError as exc:
                attempts.wait_before_next(exc)


class _Attempts:
    """Counts the failures since the last progress and waits between them."""

    def __init__(self, client: RolloutClient, what: str) -> None:
        self._client = client
        self._what = what
        self.progressed()

    def progressed(self) -> None:
        self._since_s = self._client._clock()
        self._num_failures = 0

    def wait_before_next(self, error: UnavailableError) -> None:
        """Wait, or raise ``error`` when the time is up or the wait was interrupted."""
        client = self._client
        self._num_failures += 1
        # Capped: a long outage must not make the first success late.
        backoff_s = min(
            FIRST_RETRY_DELAY_S * 2 ** min(self._num_failures - 1, 10), MAX_RETRY_DELAY_S
        )
        delay_s = max(backoff_s, error.retry_after_s or 0.0)
        waited_s = client._clock() - self._since_s
        if waited_s + delay_s > client._timeout_s:
            raise UnavailableError(
                f"{self._what}: no progress for {waited_s:.0f} s in {self._num_failures} attempts "
                f"(trainer.api_timeout_s {client._timeout_s:g}): {error.message}"
            ) from error
        LOGGER.warning("%s: %s; next attempt in %.2f s", self._what, error.message, delay_s)
        if client._pause(delay_s) is True:
            raise error


_JSON_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}


@contextmanager
def _mapped(url: str, what: str) -> Iterator[None]:
    """Transport failures become ``UnavailableError``, unreadable answers ``SlipstreamError``."""
    try:
        yield
    except httpx.TransportError as exc:
        if is_untrusted_certificate(exc):
            raise SlipstreamError(
                f"the certificate of {url} is not trusted ({exc}): name its authority with "
                "trainer.ca_file or SLIPSTREAM_CA_FILE"
            ) from exc
        detail = str(exc) or type(exc).__name__
        raise UnavailableError(f"{what} at {url} failed: {detail}") from exc
    except ValidationError as exc:
        raise SlipstreamError(
            f"{what} at {url}: the answer is not what this version expects "
            f"({exc.error_count()} problems, first: {exc.errors()[0]['msg']})"
        ) from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise SlipstreamError(f"{what} at {url} failed: {exc}") from exc
