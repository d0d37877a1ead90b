"""Builds the FastAPI application around a service."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from rollout_server.api import control_plane, dashboard, data_plane, openai, operations
from rollout_server.api.bodies import install_openapi
from rollout_server.api.errors import install_error_handlers
from rollout_server.api.middleware import BodyLimit, RequestContext
from rollout_server.service import RolloutService


def create_app(service: RolloutService) -> FastAPI:
    """Routes, errors and middleware over ``service``, whose life is the caller's business."""
    app = FastAPI(
        title="Slipstream rollout service",
        version=version("slipstream-rollout"),
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for plane in (data_plane, openai, control_plane, operations, dashboard):
        app.include_router(plane.router)
    install_error_handlers(app)
    install_openapi(app)
    app.add_middleware(BodyLimit, max_body_bytes=service.config.server.limits.max_body_bytes)
    app.add_middleware(RequestContext, metrics=service.metrics)  # last added is outermost
    return app
