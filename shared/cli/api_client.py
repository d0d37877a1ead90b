"""Synchronous client of the rollout server for the commands; maps HTTP failures to our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from shared.credentials import ClientCredentials, is_untrusted_certificate
from shared.errors import (
    ConflictError,
    RequestError,
    SlipstreamError,
    UnavailableError,
    WeightCommitError,
    WeightTransferError,
)
from shared.schemas.base import ErrorResponse
from shared.schemas.rollouts import RolloutRequest, StreamLine

ResponseModel = TypeVar("ResponseModel", bound=BaseModel)

CONNECT_TIMEOUT_S = 5.0

_ERRORS: dict[str, type[SlipstreamError]] = {
    kind.code: kind for kind in (ConflictError, WeightTransferError, WeightCommitError)
}
"""Errors that callers tell apart."""


class ApiClient:
    """One connection pool to one server.

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
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        credentials = credentials or ClientCredentials()
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            headers=credentials.headers(),
            verify=credentials.verification(),
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

    def get(self, path: str, response_model: type[ResponseModel]) -> ResponseModel:
        """``GET path``, parsed."""
        return self._send("GET", path, None, response_model)

    def send(
        self, method: str, path: str, body: BaseModel, response_model: type[ResponseModel]
    ) -> ResponseModel:
        """``method path`` with the fields of ``body`` that are set, parsed."""
        return self._send(method, path, body, response_model)

    def stream_rollouts(self, request: RolloutRequest) -> Iterator[StreamLine]:
        """``POST /v1/rollouts`` with ``stream``: one line per finished group, then ``done``.

        Raises:
            SlipstreamError: also when the stream ends with an ``error`` line or with no end line.
        """
        body = request.model_dump(mode="json", exclude_none=True)
        finished = False
        with (
            self._mapped("POST /v1/rollouts"),
            self._http.stream("POST", "/v1/rollouts", json=body) as response,
        ):
            if response.status_code >= 400:
                response.read()
                raise error_from_response(response)
            for text in response.iter_lines():
                if not text:
                    continue
                line = StreamLine.model_validate_json(text)
                if line.type == "error":
                    detail = line.error.message if line.error else "no reason given"
                    raise SlipstreamError(f"the server gave up on the request: {detail}")
                finished = line.type == "done"
                yield line
        if not finished:
            raise UnavailableError("the server closed the stream before the request was done")

    def _send(
        self,
        method: str,
        path: str,
        body: BaseModel | None,
        response_model: type[ResponseModel],
    ) -> ResponseModel:
        content = None if body is None else body.model_dump(mode="json", exclude_none=True)
        with self._mapped(f"{method} {path}"):
            response = self._http.request(method, path, json=content)
            if response.status_code >= 400:
                raise error_from_response(response)
            return response_model.model_validate_json(response.content)

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as exc:
            if is_untrusted_certificate(exc):
                raise SlipstreamError(
                    f"the certificate of {self.url} is not trusted ({exc}): name its authority "
                    "with --ca-file or SLIPSTREAM_CA_FILE"
                ) from exc
            raise UnavailableError(
                f"no server answers at {self.url} ({exc}); start one with `slipstream serve`, or "
                "name it with --url or SLIPSTREAM_URL"
            ) from exc
        except httpx.TimeoutException as exc:
            raise UnavailableError(
                f"{what} at {self.url} took longer than {self.timeout_s:g} s (--timeout)"
            ) from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise UnavailableError(f"{what} at {self.url} failed: {exc}") from exc
        except ValidationError as exc:
            raise SlipstreamError(
                f"{what} at {self.url}: the answer is not what this version expects "
                f"({exc.error_count()} problems, first: {exc.errors()[0]['msg']})"
            ) from exc


def error_from_response(response: httpx.Response) -> SlipstreamError:
    """The error a status of 400 or above stands for, with the server's own message."""
    try:
        error = ErrorResponse.model_validate_json(response.content).error
        message, param = f"{error.message} ({response.status_code} {error.code})", error.param
        code = error.code
    except ValidationError:
        message, param, code = f"HTTP {response.status_code}: {response.text[:500]}", None, ""
    if response.status_code in (429, 503):
        unavailable = UnavailableError(message, param)
        unavailable.retry_after_s = parse_retry_after(response.headers.get("retry-after"))
        return unavailable
    is_callers_fault = response.status_code < 500
    kind = _ERRORS.get(code, RequestError if is_callers_fault else SlipstreamError)
    return kind(message, param)


def parse_retry_after(text: str | None) -> float:
    """Seconds of a ``Retry-After`` header; 1 when it is absent or a date."""
    try:
        return max(0.0, float(text)) if text is not None else 1.0
    except ValueError:
        return 1.0
