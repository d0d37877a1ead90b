"""What a request is told that the server's shutdown cuts off."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from rollout_server.api.middleware import RequestContext
from tests.fakes.service import fake_service


@pytest.mark.parametrize("has_begun", [False, True])
async def test_it_may_be_asked_again_unless_half_an_answer_is_out(has_begun: bool) -> None:
    sent: list[Message] = []
    is_running = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        is_running.set()
        await asyncio.Event().wait()

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/rollouts", "headers": []}
    context = RequestContext(app, fake_service([]).metrics)
    task = asyncio.create_task(context(scope, receive, send))
    await is_running.wait()
    task.cancel()  # as uvicorn does when timeout_graceful_shutdown is over
    with pytest.raises(asyncio.CancelledError):
        await task
    if has_begun:
        assert [message["type"] for message in sent] == ["http.response.start"]
        return
    start, body = sent
    headers = {name.lower() for name, _ in start["headers"]}
    assert start["status"] == 503
    assert {b"retry-after", b"x-request-id"} <= headers
    assert json.loads(body["body"])["error"]["code"] == "unavailable"
