"""Clients that leave: whose work ends with them, and whose goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from rollout_server.service import RolloutService
from tests.fakes.engine import FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.service import fake_service, until

ROLLOUT = {"prompts": [{"prompt": "a"}, {"prompt": "b"}], "n": 2}
COMPLETION = {"model": "tiny", "prompt": ["a", "b"], "n": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 4}


@asynccontextmanager
async def stuck_service() -> AsyncIterator[tuple[FakeEngine, RolloutService, str]]:
    """Four samples that are asked for stay on the engine."""
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service = fake_service([engine])
    async with serving(service) as url:
        yield engine, service, url


async def ask_and_leave(url: str, path: str, body: dict[str, object], engine: FakeEngine) -> None:
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(f"{url}{path}", json=body))
        await until(lambda: engine.num_running == 4, "the samples to be on the engine")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rollouts", ROLLOUT),
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
    ],
)
async def test_work_that_nobody_can_ask_for_again_ends_with_its_client(
    path: str, body: dict[str, object], stream: bool
) -> None:
    async with stuck_service() as (engine, service, url):
        await ask_and_leave(url, path, {**body, "stream": stream}, engine)
        await until(lambda: engine.num_running == 0, "the engine to be free")
        await until(lambda: service.router.num_reserved("a") == 0, "the reservations to go")
        await until(lambda: service.router.accounts.num_pending == 0, "the books to close")
        assert service.router.accounts.num_cancelled == 4
        assert service.rollouts.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_work_still_queued_ends_with_its_client_too(stream: bool) -> None:
    async with stuck_service() as (engine, service, url):
        await ask_and_leave(url, "/v1/rollouts", {**ROLLOUT, "request_id": "keeps"}, engine)
        more = {"prompts": [{"prompt": "c"}], "n": 16, "stream": stream}
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.post(f"{url}/v1/rollouts", json=more))
            await until(lambda: service.router.num_queued_samples == 16, "the group to wait")
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: service.router.num_queued_samples == 0, "the group to go")
        assert engine.num_running == 4
        engine.unblocked.set()
        await until(lambda: service.router.accounts.num_pending == 0, "the books to close")
        assert service.router.accounts.num_delivered == 4


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_server() -> None:
    async with stuck_service() as (engine, service, url):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = "POST /v1/rollouts HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f'{head}Content-Length: 100\r\n\r\n{{"prompts":'.encode())
        await until(lambda: "in_progress 1.0" in service.metrics.render().decode(), "the request")
        writer.transport.abort()
        answered = 'route="/v1/rollouts",status="499"} 1.0'
        await until(lambda: answered in service.metrics.render().decode(), "its end")
        assert 'slipstream_errors_total{code="internal_error"} 0.0' in (
            service.metrics.render().decode()
        )
        assert engine.requests == []


async def test_a_stream_that_somebody_else_follows_goes_on() -> None:
    async with stuck_service() as (engine, service, url), httpx.AsyncClient(timeout=30) as other:
        async with httpx.AsyncClient() as client:
            body = {**ROLLOUT, "stream": True}
            asking = asyncio.create_task(client.post(f"{url}/v1/rollouts", json=body))
            await until(lambda: engine.num_running == 4, "the samples to be on the engine")
            name = engine.requests[0].request_id.partition("/")[0]
            following = asyncio.create_task(
                other.post(f"{url}/v1/rollouts", json={**ROLLOUT, "request_id": name})
            )
            (execution,) = [service.rollouts.find(name)]
            await until(lambda: execution.num_clients == 2, "the second client")
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: execution.num_clients == 1, "the first client to leave")
        engine.unblocked.set()
        answer = await following
        reasons = [s["finish_reason"] for g in answer.json()["groups"] for s in g["samples"]]
    assert reasons == ["stop"] * 4
    assert engine.aborted == []
