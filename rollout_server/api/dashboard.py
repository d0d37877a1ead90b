"""``/dashboard``, its static files, and ``/v1/events``, which it lives from.

Everything under ``/dashboard`` is the same for everyone and tells nothing of the server; all data
comes through ``/v1`` and is guarded like it.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from rollout_server.api.access import needs
from rollout_server.api.bodies import json_response
from rollout_server.api.dependencies import Service
from shared.errors import UnknownResourceError
from shared.schemas.base import ErrorResponse
from shared.schemas.dashboard import GroupTokens
from shared.types import ApiScope

router = APIRouter(tags=["dashboard"])

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _page_files() -> dict[str, bytes]:
    """By name. Only these are served: no path of a request ever reaches the file system."""
    page = files("rollout_server.dashboard").joinpath("page")
    return {
        entry.name: entry.read_bytes()
        for entry in page.iterdir()
        if entry.name.rpartition(".")[2] in MEDIA_TYPES
    }


PAGE_FILES = _page_files()


@router.get("/dashboard", include_in_schema=False)
async def get_page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/dashboard/{name}", include_in_schema=False)
async def get_page_file(name: str) -> Response:
    """A script, the style sheet or the icon of the page."""
    return _file(name)


# Not in the OpenAPI document: it never ends, and its shape follows the page's needs.
@router.get("/v1/events", include_in_schema=False, dependencies=needs(ApiScope.ADMIN))
async def get_events(service: Service) -> Response:
    """Server-sent events: a ``snapshot``, an ``update`` per interval, an ``end`` with the reason.

    Data of the first two is ``shared.schemas.dashboard.FeedEvent``.
    """
    feed = service.dashboard
    listener = feed.subscribe()
    return StreamingResponse(
        feed.events(listener), media_type="text/event-stream", headers=STREAM_HEADERS
    )


@router.get(
    "/v1/events/groups/{number}",
    response_model=None,
    dependencies=needs(ApiScope.ADMIN),
    responses={200: {"model": GroupTokens}, 404: {"model": ErrorResponse}},
)
async def get_group_tokens(number: int, service: Service) -> Response:
    """One of the latest delivered groups, token by token with logprobs."""
    return json_response(await service.dashboard.group_tokens(number))


def _file(name: str) -> Response:
    if name not in PAGE_FILES:
        raise UnknownResourceError(f"the dashboard has no file {name[:100]!r}")
    media_type = MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(PAGE_FILES[name], media_type=media_type, headers=PAGE_HEADERS)
