"""What every request passes through, as plain ASGI (streams stay streams).

Request ids in and out, metrics by route, the last catch for bugs, and the limit on body size.
"""

from __future__ import annotations

import logging
import re
import uuid
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.api.errors import internal_error_response, slipstream_error_response
from rollout_server.metrics import ServiceMetrics
from shared.errors import TooLargeError

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

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # The last line of defence: a bug is logged and answered, and the server lives on.
            LOGGER.exception(
                "request %s: %s %s failed", request_id.decode(), scope["method"], scope["path"]
            )
            if status:
                raise  # half an answer is out: only closing the connection tells the client
            await internal_error_response()(scope, receive, send_with_id)
        finally:
            method = scope["method"] if scope["method"] in KNOWN_METHODS else "OTHER"
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.observe_request(method, route, status, monotonic() - started_s)


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


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and isinstance(value, bytes) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex.encode()
