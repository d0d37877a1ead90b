"""Over-provisioned groups and deadlines over fake engines."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running, until

BODY: dict[str, Any] = {"prompts": [{"prompt": "a"}], "n": 2, "sampling": {"max_tokens": 8}}


def straggling(num_finished: int) -> FakeEngine:
    """So many samples of every group finish, the others never do."""
    engine = FakeEngine("a", num_finished=num_finished, num_partial_tokens=2)
    engine.unblocked.clear()
    return engine


async def post(client: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    return await client.post("/v1/rollouts", json=BODY | changes)


async def test_the_samples_that_finish_first_are_the_group() -> None:
    engine = straggling(num_finished=3)
    service = fake_service([engine], server={"progress_interval_s": 0.01})
    async with running(service) as client:
        (group,) = (await post(client, over_provision=2)).json()["groups"]
        assert service.router.accounts.num_delivered == 2
        assert service.router.accounts.num_pending == 0
        assert service.router.num_reserved("a") == 0
    assert [request.n for request in engine.requests] == [4]
    assert engine.aborted
    assert [sample["sample_index"] for sample in group["samples"]] == [0, 1]
    assert all(sample["finish_reason"] == "stop" for sample in group["samples"])
    assert all(sample["reward"] is None for sample in group["samples"])


async def test_without_over_provision_stragglers_are_waited_for() -> None:
    engine = straggling(num_finished=1)
    service = fake_service([engine], server={"progress_interval_s": 0.01})
    async with running(service) as client:
        rollout = asyncio.create_task(post(client))
        await until(lambda: engine.num_progress_asked > 3, "several looks at it")
        assert not rollout.done()
        assert engine.aborted == []
        engine.unblocked.set()
        (group,) = (await rollout).json()["groups"]
    assert len(group["samples"]) == 2


async def test_a_deadline_ends_what_is_unfinished_with_what_there_is() -> None:
    engine = straggling(num_finished=0)
    async with running(fake_service([engine])) as client:
        answer = await post(client, deadline_s=0.05)
    assert answer.status_code == 200
    (group,) = answer.json()["groups"]
    assert {sample["finish_reason"] for sample in group["samples"]} == {"abort"}


async def test_a_deadline_that_is_met_changes_nothing() -> None:
    engine = FakeEngine("a")
    async with running(fake_service([engine])) as client:
        (group,) = (await post(client, deadline_s=60)).json()["groups"]
    assert {sample["finish_reason"] for sample in group["samples"]} == {"stop"}
    assert engine.aborted == []


async def test_more_samples_than_the_limit_are_refused_by_name() -> None:
    service = fake_service(server={"limits": {"max_n": 4}})
    async with running(service) as client:
        refused = await post(client, over_provision=3)
        assert (await post(client, over_provision=2)).status_code == 200
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "over_provision"
    assert "n 2 + over_provision 3 is above server.limits.max_n 4" in error["message"]
