"""What only a real HTTP server shows: disconnects, live streams, the limit on streamed bodies."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Iterator

import httpx
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from rollout_server.api.app import create_app
from shared.schemas.base import ErrorResponse
from shared.types import RolloutRunState
from tests.fakes.engine import FakeEngine
from tests.fakes.http_server import serving
from tests.fakes.service import FakeTokenizer, fake_service, until

BODY = {"request_id": "r", "prompts": [{"prompt": "a"}, {"prompt": "b"}], "n": 2}


async def test_groups_arrive_while_others_still_run() -> None:
    slow, fast = FakeEngine("slow"), FakeEngine("fast")
    slow.unblocked.clear()
    async with serving(fake_service([slow, fast])) as url, httpx.AsyncClient() as client:
        request = {**BODY, "stream": True}
        async with client.stream("POST", f"{url}/v1/rollouts", json=request) as answer:
            lines = answer.aiter_lines()
            first = json.loads(await anext(lines))
            assert first["group"]["prompt_index"] == 1
            assert slow.num_running == 2
            slow.unblocked.set()
            rest = [json.loads(line)["type"] async for line in lines]
    assert rest == ["group", "done"]


async def test_a_client_that_leaves_finds_its_result_later() -> None:
    engine = FakeEngine("a")
    for stream in (False, True):
        engine.unblocked.clear()
        async with serving(fake_service([engine])) as url, httpx.AsyncClient() as client:
            body = {**BODY, "stream": stream}
            leaving = asyncio.create_task(client.post(f"{url}/v1/rollouts", json=body))
            await until(lambda: engine.num_running == 4, "the samples to be on the engine")
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            # The server hears of it while it answers this one.
            state = await client.get(f"{url}/v1/rollouts/r")
            assert state.json()["state"] == RolloutRunState.RUNNING
            assert engine.num_running == 4
            engine.unblocked.set()
            again = await client.post(f"{url}/v1/rollouts", json=BODY)
            fetched = await client.get(f"{url}/v1/rollouts/r")
        assert engine.aborted == []
        assert len(again.json()["groups"]) == 2
        assert fetched.json()["result"] == again.json()


async def test_a_body_over_the_limit_is_a_413_with_and_without_a_length() -> None:
    service = fake_service(server={"limits": {"max_body_bytes": 2048}})
    json_type = {"content-type": "application/json"}

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 1024
            await asyncio.sleep(0)

    async with serving(service) as url, httpx.AsyncClient() as client:
        for content in (b" " * 4096, endless()):
            answer = await client.post(f"{url}/v1/rollouts", content=content, headers=json_type)
            assert answer.status_code == 413
            error = ErrorResponse.model_validate_json(answer.content).error
            assert "server.limits.max_body_bytes 2048" in error.message
        fits = json.dumps(BODY).encode().ljust(2048)
        answer = await client.post(f"{url}/v1/rollouts", content=fits, headers=json_type)
        assert answer.status_code == 200


async def test_many_clients_at_once_each_get_their_own() -> None:
    engines = [FakeEngine("a", delay_s=0.001), FakeEngine("b")]
    service = fake_service(engines, max_num_seqs=4)
    async with serving(service) as url, httpx.AsyncClient(timeout=60) as client:

        async def one(index: int) -> list[str]:
            body = {"request_id": f"r{index}", "prompts": [{"prompt": f"p{index}"}], "n": 3}
            answer = await client.post(f"{url}/v1/rollouts", json=body)
            return [bytes(g["prompt_token_ids"]).decode() for g in answer.json()["groups"]]

        answers = await asyncio.gather(*(one(index) for index in range(60)))
        await until(lambda: service.router.accounts.num_pending == 0, "the books to close")
    assert answers == [[f"p{index}"] for index in range(60)]
    assert all(engine.requests for engine in engines)
    assert all(engine.max_running <= 8 for engine in engines)


async def test_a_full_server_refuses_before_it_tokenizes() -> None:
    class CountingTokenizer(FakeTokenizer):
        num_calls = 0

        def encode(self, text: str) -> list[int]:
            self.num_calls += 1
            return super().encode(text)

    engine, tokenizer = FakeEngine("a"), CountingTokenizer()
    engine.unblocked.clear()
    service = fake_service(
        [engine], tokenizer=tokenizer, server={"limits": {"max_pending_samples": 5}}
    )
    async with serving(service) as url, httpx.AsyncClient() as client:
        first = asyncio.create_task(client.post(f"{url}/v1/rollouts", json=BODY))
        await until(lambda: engine.num_running == 4, "the samples to be on the engine")
        num_calls = tokenizer.num_calls
        refused = await client.post(f"{url}/v1/rollouts", json={**BODY, "request_id": "other"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert tokenizer.num_calls == num_calls == 2
        again = asyncio.create_task(client.post(f"{url}/v1/rollouts", json=BODY))
        await until(lambda: service.rollouts.find("r").num_clients == 2, "the second client")
        engine.unblocked.set()
        assert (await again).content == (await first).content


def test_no_dependency_of_a_route_costs_a_thread() -> None:
    def calls(dependant: Dependant) -> Iterator[object]:
        for inner in dependant.dependencies:
            yield inner.call
            yield from calls(inner)

    routes = [r for r in create_app(fake_service()).routes if isinstance(r, APIRoute)]
    found = [call for route in routes for call in calls(route.dependant)]
    assert len(found) > len(routes)
    for call in found:
        runs_on_the_loop = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
            getattr(call, "__call__", None)  # noqa: B004 - what FastAPI looks at
        )
        assert runs_on_the_loop, call
