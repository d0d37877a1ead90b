"""What every request passes through, as plain ASGI (streams stay streams).

Request ids in and out, metrics by route, the last catch for bugs, and the limit on body size.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.api.errors import internal_error_response, slipstream_error_response
from rollout_server.api.noted_errors import note_error, noted_errors
from rollout_server.metrics import ServiceMetrics
from rollout_server.tracing import remote_parent
from shared.errors import SlipstreamError, TooLargeError, UnavailableError
from shared.logging import log_context

LOGGER = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
KNOWN_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class RequestContext:
    """Outermost: whatever happens inside, the client gets an answer with its request id."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        with (
            log_context(http_request_id=request_id.decode()),
            remote_parent(_header(scope, b"traceparent")),
            noted_errors() as codes,
        ):
            await self._serve(request_id, codes, scope, receive, send)

    async def _serve(
        self, request_id: bytes, codes: list[str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        scope.setdefault("state", {})["request_id"] = request_id.decode()  # for what routes log
        started_s = monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id)],
                }
            await send(message)

        self._metrics.begin_request()
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # At its shutdown uvicorn cancels what still runs, and would answer with a bare 500.
            if not status:
                error = UnavailableError("the server is shutting down")
                await slipstream_error_response(error)(scope, receive, send_with_id)
            raise
        except Exception:
            # The last line of defence: a bug is logged and answered, and the server lives on.
            LOGGER.exception(
                "request %s: %s %s failed", request_id.decode(), scope["method"], scope["path"]
            )
            if status:
                note_error(SlipstreamError.code)
                raise  # half an answer is out: only closing the connection tells the client
            await internal_error_response()(scope, receive, send_with_id)
        finally:
            method = scope["method"] if scope["method"] in KNOWN_METHODS else "OTHER"
            route = getattr(scope.get("route"), "path", "unmatched")
            duration_s = monotonic() - started_s
            self._metrics.observe_request(method, route, status, duration_s, codes)
            LOGGER.debug("%s %s %d in %.3f s", method, route, status, duration_s)


class BodyLimit:
    """Refuses bodies above ``server.limits.max_body_bytes`` while they stream in."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and self._too_large(int(value)):
                error = self._error(f"{int(value)} bytes")
                await slipstream_error_response(error)(scope, receive, send)
                return
        num_received_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_received_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_received_bytes += len(message.get("body", b""))
                if self._too_large(num_received_bytes):
                    raise self._error(f"{num_received_bytes} bytes so far")
            return message

        await self._app(scope, limited_receive, send)

    def _too_large(self, num_bytes: int) -> bool:
        return num_bytes > self._max_body_bytes

    def _error(self, size: str) -> TooLargeError:
        return TooLargeError(
            f"the body has {size}, above server.limits.max_body_bytes {self._max_body_bytes}"
        )


def _header(scope: Scope, wanted: bytes) -> str | None:
    for name, value in scope["headers"]:
        if name == wanted and isinstance(value, bytes):
            return value.decode("latin-1")
    return None


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and isinstance(value, bytes) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex.encode()
