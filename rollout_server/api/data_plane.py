"""``/v1/rollouts``: submit (whole or streamed), fetch again, abort."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from rollout_server.api.access import needs
from rollout_server.api.bodies import body_of, read_body
from rollout_server.api.connection import AttendedStream, while_connected
from rollout_server.api.dependencies import Service
from rollout_server.api.errors import error_body, slipstream_error_response
from rollout_server.api.formats import (
    MSGPACK_CONTENT,
    MSGPACK_TYPE,
    msgpack_lines,
    msgpack_response,
    msgpack_result,
    msgpack_with,
    wants_msgpack,
)
from rollout_server.api.limits import check_rollout
from rollout_server.api.noted_errors import note_error
from rollout_server.rollouts.execution import RolloutExecution
from shared.schemas.rollouts import (
    RolloutRequest,
    RolloutResponse,
    RolloutStatusResponse,
    StreamLine,
)
from shared.types import ApiScope, RolloutRunState

router = APIRouter(tags=["rollouts"], dependencies=needs(ApiScope.ROLLOUT))

NDJSON_TYPE = "application/x-ndjson"


@router.post(
    "/v1/rollouts",
    response_model=None,
    responses={200: {"model": RolloutResponse, "content": MSGPACK_CONTENT | {NDJSON_TYPE: {}}}},
    openapi_extra=body_of(RolloutRequest),
)
async def post_rollouts(request: Request, service: Service) -> Response:
    """Generate and score ``n`` samples per prompt.

    With a `request_id` of its own, a request goes on when its client goes away: post it again, or
    fetch it by its id. Without one it is aborted, since nobody could ask for it again.
    """
    body = await read_body(request, RolloutRequest)
    check_rollout(body, service.config.server.limits, service.model)
    execution = await service.rollouts.submit(body)
    as_msgpack = wants_msgpack(request)
    attended = service.rollouts.attended(execution)
    if body.stream:
        lines = _lines(execution)
        if as_msgpack:
            return AttendedStream(msgpack_lines(lines), MSGPACK_TYPE, attended)
        return AttendedStream(lines, NDJSON_TYPE, attended)
    with attended:
        if execution.outlives_clients:
            await execution.wait()
        else:
            await while_connected(request, execution.wait())
    if execution.error is not None:
        return slipstream_error_response(execution.error)
    if as_msgpack:
        return msgpack_response(await msgpack_result(execution))
    return Response(execution.response_body(), media_type="application/json")


@router.get(
    "/v1/rollouts/{request_id:path}",
    response_model=None,
    responses={200: {"model": RolloutStatusResponse, "content": MSGPACK_CONTENT}},
)
async def get_rollout(request: Request, request_id: str, service: Service) -> Response:
    """State and, when finished, the result."""
    return await _status_response(service.rollouts.find(request_id), wants_msgpack(request))


@router.delete(
    "/v1/rollouts/{request_id:path}",
    response_model=None,
    responses={200: {"model": RolloutStatusResponse, "content": MSGPACK_CONTENT}},
)
async def delete_rollout(request: Request, request_id: str, service: Service) -> Response:
    """Abort; partial samples come back with ``finish_reason: abort``. Safe to repeat."""
    execution = await service.rollouts.abort(request_id)
    return await _status_response(execution, wants_msgpack(request))


async def _lines(execution: RolloutExecution) -> AsyncIterator[bytes]:
    # Group lines are joined from bytes that were encoded once; request ids need no escaping.
    head = b'{"type":"group","request_id":"%b","group":' % execution.request_id.encode()
    async for group in execution.groups():
        yield head + group + b"}\n"
    if execution.error is None:
        last = StreamLine(type="done", request_id=execution.request_id, usage=execution.usage)
    else:
        error = error_body(execution.error)
        note_error(error.code)
        last = StreamLine(type="error", request_id=execution.request_id, error=error)
    yield last.model_dump_json(exclude_none=True).encode() + b"\n"


async def _status_response(execution: RolloutExecution, as_msgpack: bool) -> Response:
    status = RolloutStatusResponse(
        request_id=execution.request_id,
        state=execution.state,
        num_groups=execution.num_groups,
        num_finished_groups=execution.num_finished_groups,
        error=None if execution.error is None else error_body(execution.error),
    )
    content = status.model_dump_json(exclude={"result"}).encode()
    if as_msgpack:
        result = None
        if execution.state is RolloutRunState.FINISHED:
            result = await msgpack_result(execution)
        return msgpack_response(msgpack_with(content, "result", result))
    if execution.state is RolloutRunState.FINISHED:
        content = content[:-1] + b',"result":' + execution.response_body() + b"}"
    return Response(content, media_type="application/json")
