"""Builds the FastAPI application around a service."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from rollout_server.api import control_plane, dashboard, data_plane, openai, operations
from rollout_server.api.access import Authentication, check_every_route_has_a_scope
from rollout_server.api.bodies import install_openapi
from rollout_server.api.compression import Compression
from rollout_server.api.errors import DOCUMENTED_ERRORS, install_error_handlers
from rollout_server.api.middleware import BodyLimit, RequestContext
from rollout_server.service import RolloutService
from shared.api_keys import ApiKeys


def create_app(service: RolloutService, api_keys: ApiKeys | None = None) -> FastAPI:
    """Routes, errors and middleware over ``service``, whose life is the caller's business.

    Args:
        api_keys: the keys callers need; absent or empty, everything is open.
    """
    keys = api_keys if api_keys is not None else ApiKeys()
    app = FastAPI(
        title="Slipstream rollout service",
        version=version("slipstream-rollout"),
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.api_keys = keys
    for plane in (data_plane, openai, control_plane, operations, dashboard):
        app.include_router(plane.router, responses=DOCUMENTED_ERRORS)
    check_every_route_has_a_scope(app.routes)
    install_error_handlers(app)
    install_openapi(app)
    min_bytes = service.config.server.compress_above_bytes
    if min_bytes is not None:
        app.add_middleware(Compression, min_bytes=min_bytes)
    app.add_middleware(BodyLimit, max_body_bytes=service.config.server.limits.max_body_bytes)
    # Before anything of a body is read.
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(RequestContext, metrics=service.metrics)  # last added is outermost
    return app
