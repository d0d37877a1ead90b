"""One attempt at a time over one pool of connections: bodies out and in, failures as our errors."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Self

import httpx

from shared.client.bodies import AnswerT, LineReader, decode_body, encode_body
from shared.client.calls import Call
from shared.client.failures import Wording, error_from_response, mapped
from shared.client.headers import WireFormat, request_headers
from shared.credentials import ClientCredentials
from shared.errors import ConfigurationError
from shared.schemas.rollouts import StreamLine

CONNECT_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 60.0
POOL_TIMEOUT_S = 10.0


class Endpoint:
    """What requests to one server have in common, whoever sends them.

    Args:
        timeout_s: longest silence of the server.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        credentials: ClientCredentials | None = None,
        wire_format: WireFormat = WireFormat.AUTO,
        wording: Wording | None = None,
    ) -> None:
        if wire_format is WireFormat.MSGPACK and find_spec("msgpack") is None:
            raise ConfigurationError("wire_format msgpack needs the package msgpack")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.wording = wording or Wording()
        credentials = credentials or ClientCredentials()
        self.headers = request_headers(self.url, wire_format) | credentials.headers()
        self.verification = credentials.verification()

    def timeout(self, call: Call[AnswerT]) -> httpx.Timeout:
        """The bounds of every wait of a call."""
        return httpx.Timeout(
            connect=min(CONNECT_TIMEOUT_S, self.timeout_s),
            read=min(call.timeout_s, self.timeout_s),
            write=min(WRITE_TIMEOUT_S, self.timeout_s),
            pool=min(POOL_TIMEOUT_S, self.timeout_s),
        )

    def content(self, call: Call[AnswerT]) -> bytes | None:
        """The body, encoded."""
        return encode_body(call.body, self.headers["Content-Type"])


class Connection:
    """Sends calls to an endpoint. Safe to use from several threads.

    Every method raises ``RequestError`` for a 4xx, ``UnavailableError`` when the server cannot be
    reached, breaks off, or answers 429 or 503, and ``SlipstreamError`` for any other failure.
    """

    def __init__(self, endpoint: Endpoint, transport: httpx.BaseTransport | None = None) -> None:
        self.endpoint = endpoint
        self._http = httpx.Client(
            base_url=endpoint.url,
            headers=endpoint.headers,
            verify=endpoint.verification,
            transport=transport,
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

    def send(self, call: Call[AnswerT]) -> AnswerT:
        """One answer, parsed."""
        endpoint = self.endpoint
        timeout = endpoint.timeout(call)
        with mapped(call.what, endpoint.url, timeout, endpoint.wording):
            response = self._http.request(
                call.method, call.path, content=endpoint.content(call), timeout=timeout
            )
            if response.status_code >= 400:
                raise error_from_response(response)
            return decode_body(response.content, content_type_of(response), call.answer)

    def lines(self, call: Call[StreamLine]) -> Iterator[StreamLine]:
        """The lines of a streamed answer; ``done`` is the last one."""
        endpoint = self.endpoint
        timeout = endpoint.timeout(call)
        with (
            mapped(call.what, endpoint.url, timeout, endpoint.wording),
            self._http.stream(
                call.method, call.path, content=endpoint.content(call), timeout=timeout
            ) as response,
        ):
            if response.status_code >= 400:
                response.read()
                raise error_from_response(response)
            reader = LineReader(call.what, endpoint.url, content_type_of(response))
            for piece in response.iter_bytes():
                for line in reader.feed(piece):
                    yield line
                    if line.type == "done":
                        return
            reader.finish()


def content_type_of(response: httpx.Response) -> str:
    """Without its parameters."""
    content_type: str = response.headers.get("content-type", "")
    return content_type.partition(";")[0].strip().lower()
