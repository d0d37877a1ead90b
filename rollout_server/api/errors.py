"""Maps every error to one body shape and status, in one place.

``type`` follows OpenAI's families, so that its clients raise the right exceptions; ``code`` is the
stable name of the error class; ``param`` is the dotted path of the field at fault.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from rollout_server.api.noted_errors import note_error
from shared.errors import SlipstreamError
from shared.schemas.base import ErrorBody, ErrorResponse

LOGGER = logging.getLogger(__name__)

MAX_SHOWN_CHARACTERS = 120
MAX_SHOWN_PROBLEMS = 3
MAX_LISTED_PROBLEMS = 1000
"""A list of more than that would take more memory than the body."""
MAX_MESSAGE_CHARACTERS = 2000
"""Messages quote what was sent, and what was sent may be long."""

CLIENT_CLOSED_REQUEST = 499
CHALLENGES = {
    "unauthenticated": 'Bearer realm="slipstream"',
    "invalid_api_key": 'Bearer realm="slipstream", error="invalid_token"',
    "forbidden": 'Bearer realm="slipstream", error="insufficient_scope"',
}
"""``WWW-Authenticate`` by error code (RFC 6750, section 3)."""

DOCUMENTED_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The caller's fault, or too much at once (429)"},
    "5XX": {"model": ErrorResponse, "description": "The server's fault, or no engine (503)"},
}
"""For OpenAPI, at every route."""

_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]*")
_UNION_TAGS = frozenset({"str", "int", "float", "bool", "list", "dict", "none", "nullable"})


class BodyError(Exception):
    """A body that does not validate; carries pydantic's account of it."""

    def __init__(self, cause: ValidationError) -> None:
        num_problems = cause.error_count()
        super().__init__(f"{num_problems} problems")
        if num_problems <= MAX_LISTED_PROBLEMS:
            self.problems: Sequence[Any] = cause.errors(include_url=False, include_context=False)
        else:
            message = f"{num_problems} fields or values are not what they should be"
            self.problems = [{"type": "value_error", "loc": (), "msg": message}]


class HttpError(Exception):
    """A request that is wrong before it says anything: content type, route, method."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


def client_closed() -> HttpError:
    """Nobody will read it; logs and metrics do."""
    return HttpError(CLIENT_CLOSED_REQUEST, "client_closed", "the client went away")


def error_body(error: SlipstreamError) -> ErrorBody:
    """Wire form of an error of ours."""
    return ErrorBody(
        code=error.code,
        type=error_type(error.status),
        message=_cut(error.message, MAX_MESSAGE_CHARACTERS),
        param=error.param,
    )


def error_type(status: int) -> str:
    """Family of a status."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    if status == 503:
        return "unavailable_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_response(status: int, body: ErrorBody, retry_after_s: float | None = None) -> Response:
    """``ErrorResponse`` with its headers."""
    note_error(body.code)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s or 1.0)))
    if body.code in CHALLENGES:
        headers["WWW-Authenticate"] = CHALLENGES[body.code]
    return Response(
        ErrorResponse(error=body).model_dump_json(),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def slipstream_error_response(error: SlipstreamError) -> Response:
    """The answer to an error of ours."""
    return error_response(error.status, error_body(error), error.retry_after_s)


def internal_error_response() -> Response:
    """The answer to a bug of ours: says nothing of its inside."""
    body = ErrorBody(
        code="internal_error",
        type=error_type(500),
        message="internal error; the server's log has the details under this request's id",
    )
    return error_response(500, body)


def validation_response(problems: Sequence[Any]) -> Response:
    """400 for what is not JSON, 422 for JSON that does not fit; names field, value and limit."""
    malformed = problems[0]["type"] in ("json_invalid", "json_type")
    by_field = _one_per_field(problems)
    shown = [_describe(problem) for problem in by_field[:MAX_SHOWN_PROBLEMS]]
    if len(by_field) > MAX_SHOWN_PROBLEMS:
        shown.append(f"and {len(by_field) - MAX_SHOWN_PROBLEMS} more problems")
    status = 400 if malformed else 422
    body = ErrorBody(
        code="malformed_json" if malformed else "validation_failed",
        type=error_type(status),
        message="; ".join(shown),
        param=None if malformed else dotted_path(problems[0]["loc"]) or None,
    )
    return error_response(status, body)


def dotted_path(location: Sequence[str | int]) -> str:
    """``prompts.0.answer`` from pydantic's location, without its names of union members."""
    parts = []
    for part in location:
        if isinstance(part, str) and not (_FIELD_NAME.fullmatch(part) and part not in _UNION_TAGS):
            # An unknown field may be called anything: shown as long as it is the last part.
            if part is location[-1] and "[" not in part and part not in _UNION_TAGS:
                parts.append(part[:MAX_SHOWN_CHARACTERS])
            break
        parts.append(str(part))
    return ".".join(parts)


def install_error_handlers(app: FastAPI) -> None:
    """Register the mapping. What no handler knows is caught by ``middleware``."""

    @app.exception_handler(SlipstreamError)
    async def on_slipstream_error(request: Request, exc: SlipstreamError) -> Response:
        if exc.status >= 500:
            LOGGER.warning("%s %s: %s", request.method, request.url.path, exc.message)
        return slipstream_error_response(exc)

    @app.exception_handler(BodyError)
    async def on_body_error(request: Request, exc: BodyError) -> Response:
        return validation_response(exc.problems)

    @app.exception_handler(RequestValidationError)
    async def on_parameter_error(request: Request, exc: RequestValidationError) -> Response:
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in exc.errors()]
        return validation_response(problems)

    @app.exception_handler(HttpError)
    async def on_http_error(request: Request, exc: HttpError) -> Response:
        body = ErrorBody(
            code=exc.code, type=error_type(exc.status), message=exc.message, param=exc.param
        )
        return error_response(exc.status, body)

    @app.exception_handler(HTTPException)
    async def on_routing_error(request: Request, exc: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
        where = f"{request.method[:20]} {request.url.path[:MAX_SHOWN_CHARACTERS]}"
        body = ErrorBody(
            code=code,
            type=error_type(exc.status_code),
            message=f"{where}: {exc.detail}",
        )
        response = error_response(exc.status_code, body)
        response.headers.update(exc.headers or {})
        if exc.status_code == 405:
            # Starlette names the methods of one route only, and a path may have several.
            response.headers["Allow"] = ", ".join(_allowed_methods(request))
        return response


def _allowed_methods(request: Request) -> list[str]:
    methods: set[str] = set()
    for route in request.app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods)


def _one_per_field(problems: Sequence[Any]) -> list[Any]:
    """A field of several possible forms gets one complaint per form: keep the form that came
    closest (the deepest complaint, and of lists the one furthest down its list), or the first when
    none came close."""
    by_path: dict[str, list[Any]] = {}
    for problem in problems:
        by_path.setdefault(dotted_path(problem["loc"]), []).append(problem)
    kept = []
    for same_path in by_path.values():
        depths = [len(problem["loc"]) for problem in same_path]
        deepest = [p for p, depth in zip(same_path, depths, strict=True) if depth == max(depths)]
        furthest = max(reversed(deepest), key=_last_index)  # the last of several
        kept.append(deepest[0] if min(depths) == max(depths) else furthest)
    return kept


def _last_index(problem: Any) -> int:
    return next((part for part in reversed(problem["loc"]) if isinstance(part, int)), -1)


def _cut(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else text[:max_characters] + "..."


def _describe(problem: Any) -> str:
    path = dotted_path(problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in ("json_invalid", "json_type"):
        return f"the body is not a JSON object: {message}"
    value = ""
    if problem["type"] not in ("missing", "value_error", "model_type"):
        value = f" (got {_shown(problem['input'])})"
    return f"{path or 'body'}: {message}{value}"


def _shown(value: object) -> str:
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    # repr of a huge int raises ValueError in Python 3.11 and later.
    text = "a huge integer" if isinstance(value, int) and abs(value) > 10**100 else repr(value)
    return _cut(text, MAX_SHOWN_CHARACTERS)
