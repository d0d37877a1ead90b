"""What can go wrong over HTTP, as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from pydantic import ValidationError

from shared.credentials import is_untrusted_certificate
from shared.errors import (
    ConflictError,
    ModelNotFoundError,
    RequestError,
    SlipstreamError,
    TooLargeError,
    UnavailableError,
    UnknownResourceError,
    WeightCommitError,
    WeightTransferError,
)
from shared.schemas.base import ErrorResponse

_ERRORS: dict[str, type[SlipstreamError]] = {
    kind.code: kind
    for kind in (
        ConflictError,
        ModelNotFoundError,
        TooLargeError,
        UnknownResourceError,
        WeightCommitError,
        WeightTransferError,
    )
}
"""Errors that callers tell apart, by the server's code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """What messages advise, in the words of whoever made the client."""

    timeout_setting: str = "timeout_s"
    """The setting that bounds waits."""
    no_server_advice: str = ""
    """Follows the message that nobody listens."""
    authority_setting: str = "credentials"
    """Names the authorities that are trusted for TLS."""


@contextmanager
def mapped(what: str, url: str, timeout: httpx.Timeout, wording: Wording) -> Iterator[None]:
    """Transport failures become ``UnavailableError``, unreadable answers ``SlipstreamError``."""
    try:
        yield
    except httpx.TimeoutException as exc:
        waited_for, limit_s = _what_was_waited_for(exc, timeout)
        raise UnavailableError(
            f"{what} at {url}: {waited_for} within {limit_s or 0.0:g} s ({wording.timeout_setting})"
        ) from exc
    except httpx.ConnectError as exc:
        if is_untrusted_certificate(exc):
            raise SlipstreamError(
                f"{what}: the certificate of {url} is not trusted ({exc}): name its authority with "
                f"{wording.authority_setting}"
            ) from exc
        raise UnavailableError(
            f"{what}: no server answers at {url} ({exc}){wording.no_server_advice}"
        ) from exc
    except httpx.TransportError as exc:
        detail = str(exc) or type(exc).__name__
        raise UnavailableError(f"{what} at {url} failed: {detail}") from exc
    except ValidationError as exc:
        raise SlipstreamError(
            f"{what} at {url}: the answer is not what this version expects "
            f"({exc.error_count()} problems, first: {exc.errors()[0]['msg']})"
        ) from exc
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        raise SlipstreamError(f"{what} at {url} failed: {exc}") from exc


def error_from_response(response: httpx.Response) -> SlipstreamError:
    """The error a status of 400 or above stands for, with the server's own message.

    ``UnavailableError`` for 429 and 503, a ``RequestError`` for any other 4xx.
    """
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
    if response.status_code == httpx.codes.NOT_FOUND and code not in _ERRORS:
        return UnknownResourceError(message, param)
    is_callers_fault = response.status_code < 500
    kind = _ERRORS.get(code, RequestError if is_callers_fault else SlipstreamError)
    return kind(message, param)


def parse_retry_after(text: str | None) -> float:
    """Seconds of a ``Retry-After`` header; 1 when it is absent or a date."""
    try:
        return max(0.0, float(text)) if text is not None else 1.0
    except ValueError:
        return 1.0


def _what_was_waited_for(
    error: httpx.TimeoutException, timeout: httpx.Timeout
) -> tuple[str, float | None]:
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection", timeout.connect
    if isinstance(error, httpx.WriteTimeout):
        return "the server took no more of the request", timeout.write
    if isinstance(error, httpx.PoolTimeout):
        return "none of the client's connections became free", timeout.pool
    return "nothing arrived", timeout.read
