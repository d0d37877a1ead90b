"""The commands' client: ``shared.client`` without retries, with advice for whoever types."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import httpx
from pydantic import BaseModel

from shared.client import calls
from shared.client.bodies import AnswerT
from shared.client.calls import Call
from shared.client.connection import Connection, Endpoint
from shared.client.failures import Wording
from shared.credentials import ClientCredentials
from shared.schemas.rollouts import RolloutRequest, StreamLine

_WORDING = Wording(
    timeout_setting="--timeout",
    authority_setting="--ca-file or SLIPSTREAM_CA_FILE",
    no_server_advice="; start one with `slipstream serve`, or name it with --url or SLIPSTREAM_URL",
)


class ApiClient:
    """One connection pool to one server; every call is one attempt.

    Every method raises ``RequestError`` for a 4xx, ``UnavailableError`` when the server cannot be
    reached or answers 429 or 503, and ``SlipstreamError`` for any other failure.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        credentials: ClientCredentials | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        endpoint = Endpoint(url, timeout_s=timeout_s, credentials=credentials, wording=_WORDING)
        self._connection = Connection(endpoint, transport)

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

    def get(self, path: str, answer: type[AnswerT]) -> AnswerT:
        """``GET path``, parsed."""
        return self._connection.send(
            Call(what=f"GET {path}", method="GET", path=path, answer=answer)
        )

    def send(
        self, method: str, path: str, body: BaseModel | None, answer: type[AnswerT]
    ) -> AnswerT:
        """``method path`` with the fields of ``body`` that are set, parsed."""
        what = f"{method} {path}"
        return self._connection.send(
            Call(what=what, method=method, path=path, answer=answer, body=body)
        )

    def stream_rollouts(self, request: RolloutRequest) -> Iterator[StreamLine]:
        """``POST /v1/rollouts`` with ``stream``: one line per finished group, then ``done``.

        Raises:
            SlipstreamError: also when the stream ends with an ``error`` line or with no end line.
        """
        return self._connection.lines(calls.stream_rollouts(request))

    def abort_rollouts(self, request: RolloutRequest) -> None:
        """``DELETE /v1/rollouts/{request_id}``."""
        assert request.request_id is not None
        self._connection.send(calls.abort_rollout(request.request_id))
