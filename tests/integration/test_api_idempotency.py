"""One request id is one execution: attached to, answered again, kept, and never mixed up."""

from __future__ import annotations

import asyncio

from shared.errors import EngineError
from shared.schemas.rollouts import (
    RolloutStatusResponse,
)
from shared.types import RolloutRunState
from tests.fakes.engine import FakeEngine
from tests.fakes.rollout_calls import body, lines, post
from tests.fakes.service import fake_service, running, until


async def test_the_same_id_and_body_attaches_to_the_running_request() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    async with running(fake_service([engine])) as client:
        first = asyncio.create_task(post(client, body("r")))
        await until(lambda: len(engine.requests) == 2, "the request to run")
        second = asyncio.create_task(post(client, body("r")))
        streamed = asyncio.create_task(lines(client, body("r")))
        running_state = (await client.get("/v1/rollouts/r")).json()
        engine.unblocked.set()
        answers = [await first, await second]
        assert answers[0] == answers[1]
        assert [line.type for line in await streamed] == ["group", "group", "done"]
    assert running_state["state"] == "running"
    assert "result" not in running_state
    assert len(engine.requests) == 2


async def test_two_posts_of_one_id_at_the_same_moment_start_it_once() -> None:
    engine = FakeEngine("a")
    async with running(fake_service([engine])) as client:
        answers = await asyncio.gather(*(post(client, body("r")) for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)
    assert len(engine.requests) == 2


async def test_a_finished_request_gives_the_same_result_again() -> None:
    engine = FakeEngine("a")
    async with running(fake_service([engine])) as client:
        first = await post(client, body("r"))
        assert await post(client, body("r")) == first
        answer = await client.get("/v1/rollouts/r")
        status = RolloutStatusResponse.model_validate_json(answer.content)
    assert status.state is RolloutRunState.FINISHED
    assert status.result == first
    assert status.num_finished_groups == status.num_groups == 2
    assert len(engine.requests) == 2


async def test_another_body_under_the_same_id_is_a_conflict() -> None:
    async with running(fake_service()) as client:
        await post(client, body("r"))
        answer = await client.post("/v1/rollouts", json=body("r", n=1))
    assert answer.status_code == 409
    assert answer.json()["error"]["param"] == "request_id"


async def test_a_failed_request_posted_again_starts_afresh() -> None:
    engine = FakeEngine("a", fail_with=EngineError("bad step"))
    async with running(fake_service([engine])) as client:
        failed = await client.post("/v1/rollouts", json=body("r"))
        assert failed.status_code == 500
        engine.fail_with = None
        assert len((await post(client, body("r"))).groups) == 2


async def test_a_kept_result_expires() -> None:
    async with running(fake_service(server={"result_ttl_s": 0.01})) as client:
        await post(client, body("r"))
        await asyncio.sleep(0.05)
        assert (await client.get("/v1/rollouts/r")).status_code == 404
