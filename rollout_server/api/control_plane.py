"""Weights, engines, pauses and speculation: what operators and trainers steer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from rollout_server.api.access import needs
from rollout_server.api.bodies import body_of, json_response, read_body
from rollout_server.api.dependencies import Service
from rollout_server.status_poller import NO_HISTORY_STEP
from shared.api_keys import ApiKey
from shared.schemas.base import ErrorResponse
from shared.schemas.engines import EnginesResponse, LeaveRequest, PauseRequest, ScaleRequest
from shared.schemas.speculation import SpeculationChange, SpeculationResponse
from shared.schemas.weights import AuditResponse, PublishRequest, PublishResponse, WeightsResponse
from shared.types import ApiScope

router = APIRouter(tags=["control"], dependencies=needs(ApiScope.ADMIN))

SinceStep = Annotated[
    int,
    Query(ge=0, le=NO_HISTORY_STEP, description="Only decisions after this step of an engine."),
]
Replace = Annotated[
    bool, Query(description="Start another in its place; false lowers the number of engines.")
]
ENGINE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": EnginesResponse},
    404: {"model": ErrorResponse},
}
History = Annotated[
    int | None,
    Query(ge=0, le=1_000_000, description="At most this many of each engine's latest decisions."),
]


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


@router.post("/v1/weights/audit", response_model=None, responses={200: {"model": AuditResponse}})
async def audit_weights(service: Service) -> Response:
    """Compare every engine's live weights and drafter with the committed ones, tensor by tensor.

    Takes seconds to minutes; engines go on generating between layers, pushes wait. An engine with
    other weights is taken out and replaced.
    """
    return json_response(await service.audit_weights())


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
    """Set how many engines there are; answers at once, the change goes on in the background.

    With several pools the body names one. A pool in quarantine replaces its engines again.
    """
    body = await read_body(request, ScaleRequest)
    return json_response(await service.scale(body.count, body.pool))


@router.post(
    "/v1/engines/{engine_id}/drain",
    response_model=None,
    responses=ENGINE_RESPONSES | {409: {"model": ErrorResponse}},
    openapi_extra=body_of(LeaveRequest),
)
async def drain_engine(engine_id: str, request: Request, service: Service) -> Response:
    """Let an engine finish what it has, then stop it; answers at once.

    It gets no new groups from now on. Another engine starts in its place, unless `replace` is
    false. What has not finished after `engine.drain_timeout_s` is generated again elsewhere.
    """
    body = await read_body(request, LeaveRequest)
    return json_response(service.drain(engine_id, replace=body.replace))


@router.delete(
    "/v1/engines/{engine_id}",
    response_model=None,
    responses=ENGINE_RESPONSES,
)
async def delete_engine(engine_id: str, service: Service, replace: Replace = True) -> Response:
    """Stop an engine at once, whatever it is doing; its groups are generated again elsewhere."""
    return json_response(service.remove(engine_id, replace=replace))


@router.post(
    "/v1/pause",
    response_model=None,
    responses={200: {"model": EnginesResponse}},
    openapi_extra=body_of(PauseRequest),
)
async def pause(request: Request, service: Service) -> Response:
    """Stop generating on every engine, and on those that join, until `POST /v1/resume`.

    `keep` freezes what runs, `wait` answers when it has finished, `abort` ends it with
    `finish_reason: abort`. Rollouts are accepted and queued meanwhile; weight pushes go on.
    """
    body = await read_body(request, PauseRequest)
    await service.generation.pause(body.mode, caller=caller_of(request))
    return json_response(service.engines())


@router.post("/v1/resume", response_model=None, responses={200: {"model": EnginesResponse}})
async def resume(request: Request, service: Service) -> Response:
    """End a pause; nothing happens where there is none. A body is not read."""
    await service.generation.resume(caller=caller_of(request))
    return json_response(service.engines())


@router.get("/v1/speculation", response_model=None, responses={200: {"model": SpeculationResponse}})
async def get_speculation(
    service: Service, since_step: SinceStep = 0, history: History = None
) -> Response:
    """The policy in force, engines with settings of their own, and what every engine does and why.

    Each engine's `history` has its recorded decisions with what went into them and the reason:
    every change of the draft length, and samples in between.
    """
    return json_response(
        await service.live_speculation.read(since_step=since_step, history=history)
    )


@router.patch(
    "/v1/speculation",
    response_model=None,
    responses={200: {"model": SpeculationResponse}, 404: {"model": ErrorResponse}},
    openapi_extra=body_of(SpeculationChange),
)
async def patch_speculation(request: Request, service: Service) -> Response:
    """Change the policy live: it holds from an engine's next step on.

    Without `engine_ids` the change is for every engine and for those that join later, and engines
    with settings of their own go back to the policy for all. With `engine_ids` these engines get
    settings of their own, which last until the next change for all. An impossible change, or an
    unknown engine (404), is refused before any engine is touched. The answer is that of `GET`,
    without history.
    """
    change = await read_body(request, SpeculationChange)
    live = service.live_speculation
    await live.patch(change.patch, engine_ids=change.engine_ids, caller=caller_of(request))
    return json_response(await live.read(since_step=NO_HISTORY_STEP))


def caller_of(request: Request) -> str:
    """Who asked, as the log shall name it."""
    address = request.client.host if request.client is not None else "an unknown address"
    key: ApiKey | None = getattr(request.state, "api_key", None)
    who = "" if key is None else f" with API key {key.name!r}"
    return f"request {request.state.request_id} from {address}{who}"
