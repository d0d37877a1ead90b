"""The routes of the service as values: method, path, bodies, and how long an answer may take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from shared.schemas.engines import EnginesResponse, LeaveRequest, PauseRequest, ScaleRequest
from shared.schemas.operations import VersionResponse
from shared.schemas.rollouts import RolloutRequest, RolloutStatusResponse, StreamLine
from shared.schemas.speculation import SpeculationResponse
from shared.schemas.weights import PublishRequest, PublishResponse, WeightsResponse
from shared.types import PauseMode

AnswerT = TypeVar("AnswerT", bound=BaseModel)

STATUS_TIMEOUT_S = 10.0
"""For small answers; the control plane must not hang on a busy data plane."""


class Unread(BaseModel):
    """An answer of which only the status matters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[AnswerT]):
    """One request to the service. All of them are safe to repeat."""

    what: str
    """For messages."""
    method: str
    path: str
    answer: type[AnswerT]
    body: BaseModel | None = None
    timeout_s: float = math.inf
    """Longest silence; the client's own where that is shorter."""


def stream_rollouts(request: RolloutRequest) -> Call[StreamLine]:
    """Repeating it attaches to the running request, thanks to its ``request_id``.

    That is also why a broken stream is taken up with this call and not by fetching the result: a
    server that does not know the request (any more) starts it.
    """
    return Call(
        what=f"rollouts {request.request_id}",
        method="POST",
        path="/v1/rollouts",
        answer=StreamLine,
        body=request,
    )


def fetch_rollout(request_id: str) -> Call[RolloutStatusResponse]:
    return Call(
        what=f"result of rollouts {request_id}",
        method="GET",
        path=f"/v1/rollouts/{request_id}",
        answer=RolloutStatusResponse,
    )


def abort_rollout(request_id: str) -> Call[Unread]:
    return Call(
        what=f"abort of rollouts {request_id}",
        method="DELETE",
        path=f"/v1/rollouts/{request_id}",
        answer=Unread,
        timeout_s=STATUS_TIMEOUT_S,
    )


def publish(request: PublishRequest, answer_timeout_s: float) -> Call[PublishResponse]:
    return Call(
        what=f"push of version {request.version}",
        method="POST",
        path="/v1/weights",
        answer=PublishResponse,
        body=request,
        timeout_s=answer_timeout_s,
    )


def weights() -> Call[WeightsResponse]:
    return _status("weight status", "/v1/weights", WeightsResponse)


def speculation(since_step: int) -> Call[SpeculationResponse]:
    path = f"/v1/speculation?since_step={since_step}"
    return _status("speculation status", path, SpeculationResponse)


def engines() -> Call[EnginesResponse]:
    return _status("engine status", "/v1/engines", EnginesResponse)


def scale(count: int, pool: str | None = None) -> Call[EnginesResponse]:
    return Call(
        what=f"scaling to {count} engines",
        method="PUT",
        path="/v1/engines",
        answer=EnginesResponse,
        body=ScaleRequest(count=count, pool=pool),
        timeout_s=STATUS_TIMEOUT_S,
    )


def drain_engine(engine_id: str, replace: bool) -> Call[EnginesResponse]:
    return Call(
        what=f"draining {engine_id}",
        method="POST",
        path=f"/v1/engines/{quote(engine_id, safe='')}/drain",
        answer=EnginesResponse,
        body=LeaveRequest(replace=replace),
        timeout_s=STATUS_TIMEOUT_S,
    )


def remove_engine(engine_id: str, replace: bool) -> Call[EnginesResponse]:
    return Call(
        what=f"removing {engine_id}",
        method="DELETE",
        path=f"/v1/engines/{quote(engine_id, safe='')}?replace={str(replace).lower()}",
        answer=EnginesResponse,
        timeout_s=STATUS_TIMEOUT_S,
    )


def pause(mode: PauseMode, timeout_s: float) -> Call[EnginesResponse]:
    return Call(
        what=f"pausing generation, mode {mode.value}",
        method="POST",
        path="/v1/pause",
        answer=EnginesResponse,
        body=PauseRequest(mode=mode),
        timeout_s=timeout_s,
    )


def resume() -> Call[EnginesResponse]:
    return Call(
        what="resuming generation",
        method="POST",
        path="/v1/resume",
        answer=EnginesResponse,
        timeout_s=STATUS_TIMEOUT_S,
    )


def version() -> Call[VersionResponse]:
    return _status("version", "/version", VersionResponse)


def readiness() -> Call[Unread]:
    return _status("server to be ready", "/readyz", Unread)


def _status(what: str, path: str, answer: type[AnswerT]) -> Call[AnswerT]:
    return Call(what=what, method="GET", path=path, answer=answer, timeout_s=STATUS_TIMEOUT_S)
