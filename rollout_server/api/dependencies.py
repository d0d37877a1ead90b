"""What routes are given."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from rollout_server.service import RolloutService


async def _service(request: Request) -> RolloutService:
    # A coroutine, though there is nothing to wait for: FastAPI runs plain functions in a thread.
    service = request.app.state.service
    assert isinstance(service, RolloutService)
    return service


Service = Annotated[RolloutService, Depends(_service)]
