"""``/v1/weights``, ``/v1/engines`` and ``/v1/speculation``: what operators and trainers steer."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from rollout_server.api.bodies import body_of, json_response, read_body
from rollout_server.api.dependencies import Service
from rollout_server.status_poller import NO_HISTORY_STEP
from shared.schemas.engines import EnginesResponse, ScaleRequest
from shared.schemas.speculation import SpeculationPatch, SpeculationResponse
from shared.schemas.weights import PublishRequest, PublishResponse, WeightsResponse

router = APIRouter(tags=["control"])

SinceStep = Annotated[int, Query(ge=0, le=NO_HISTORY_STEP)]
History = Annotated[int | None, Query(ge=0, le=1_000_000)]


@router.get("/v1/weights", response_model=None, responses={200: {"model": WeightsResponse}})
async def get_weights(service: Service) -> Response:
    """Committed version, what every engine serves, and the latest pushes."""
    return json_response(service.weights())


@router.post(
    "/v1/weights",
    response_model=None,
    responses={200: {"model": PublishResponse}},
    openapi_extra=body_of(PublishRequest),
)
async def post_weights(request: Request, service: Service) -> Response:
    """Stage, verify and commit a new version on every engine."""
    return json_response(await service.publish(await read_body(request, PublishRequest)))


@router.get("/v1/engines", response_model=None, responses={200: {"model": EnginesResponse}})
async def get_engines(service: Service) -> Response:
    """Every engine with state, load and versions, as of the last status poll."""
    return json_response(service.engines())


@router.put(
    "/v1/engines",
    response_model=None,
    responses={200: {"model": EnginesResponse}},
    openapi_extra=body_of(ScaleRequest),
)
async def put_engines(request: Request, service: Service) -> Response:
    """Set how many engines there are; answers at once, the change goes on in the background."""
    body = await read_body(request, ScaleRequest)
    return json_response(await service.scale(body.count))


@router.get("/v1/speculation", response_model=None, responses={200: {"model": SpeculationResponse}})
async def get_speculation(
    service: Service, since_step: SinceStep = 0, history: History = None
) -> Response:
    """The policy in force, and what every engine does because of it and why."""
    return json_response(
        await service.live_speculation.read(since_step=since_step, history=history)
    )


@router.patch(
    "/v1/speculation",
    response_model=None,
    responses={200: {"model": SpeculationResponse}},
    openapi_extra=body_of(SpeculationPatch),
)
async def patch_speculation(request: Request, service: Service) -> Response:
    """Change the policy live, on every engine and for every joiner."""
    await service.live_speculation.patch(await read_body(request, SpeculationPatch))
    return json_response(await service.live_speculation.read(since_step=NO_HISTORY_STEP))
