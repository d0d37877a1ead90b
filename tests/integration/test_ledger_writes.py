"""What waits for the ledger and what does not: acceptance, groups, and a disk that has no room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from rollout_server.rollouts.ledger import RolloutLedger
from rollout_server.rollouts.ledger_opening import open_ledger_file
from rollout_server.service import RolloutService
from shared.errors import EngineError
from tests.fakes.engine import FakeEngine
from tests.fakes.ledgers import HeldFile, held_ledger
from tests.fakes.rollout_calls import body, lines, post
from tests.fakes.service import fake_service, running, until


@asynccontextmanager
async def over_held_ledger(
    path: Path, *engines: FakeEngine
) -> AsyncIterator[tuple[httpx.AsyncClient, RolloutService, HeldFile]]:
    ledger, file = held_ledger(path)
    service = fake_service(list(engines) or None, ledger=ledger)
    async with running(service) as client:
        try:
            yield client, service, file
        finally:
            file.may_write.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.sqlite3"


async def test_nothing_is_generated_before_the_request_is_recorded(path: Path) -> None:
    engine = FakeEngine("e")
    async with over_held_ledger(path, engine) as (client, service, file):
        file.may_write.clear()
        posts = [asyncio.create_task(post(client, body("r"))) for _ in range(3)]
        await until(lambda: service._ledger.stats.num_unwritten == 1, "the acceptance to wait")
        assert (await client.get("/v1/rollouts/r")).json()["state"] == "running"
        assert engine.requests == []
        assert service.router.accounts.num_accepted == 0
        file.may_write.set()
        answers = await asyncio.gather(*posts)
    assert answers[0] == answers[1] == answers[2]
    assert len(engine.requests) == 2
    assert service.router.accounts.num_accepted == 4


async def test_nobody_sees_a_group_before_it_is_recorded(path: Path) -> None:
    engine = FakeEngine("e")
    engine.unblocked.clear()
    async with over_held_ledger(path, engine) as (client, service, file):
        task = asyncio.create_task(lines(client, body("r", num_prompts=1)))
        await until(lambda: engine.num_running == 2, "the group to run")
        file.may_write.clear()
        engine.unblocked.set()
        await until(lambda: service._ledger.stats.num_unwritten == 1, "the group to wait")
        assert (await client.get("/v1/rollouts/r")).json()["num_finished_groups"] == 0
        assert service.router.accounts.num_delivered == 0
        assert not task.done()
        file.may_write.set()
        assert [line.type for line in await task] == ["group", "done"]


async def test_a_client_that_leaves_before_the_record_leaves_its_request(path: Path) -> None:
    engine = FakeEngine("e")
    async with over_held_ledger(path, engine) as (client, service, file):
        file.may_write.clear()
        leaving = asyncio.create_task(post(client, body("r")))
        await until(lambda: service._ledger.stats.num_unwritten == 1, "the acceptance to wait")
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        file.may_write.set()
        await until(lambda: service.router.accounts.num_delivered == 4, "the request to run")


async def test_no_room_is_a_503_with_the_reason_and_nothing_is_taken_on(path: Path) -> None:
    engine = FakeEngine("e")
    request = body("r", num_prompts=1)
    request["prompts"][0]["metadata"] = {"filler": "x" * 500_000}
    async with over_held_ledger(path, engine) as (client, service, file):
        file.fill()
        answer = await client.post("/v1/rollouts", json=request)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "database or disk is full" in answer.json()["error"]["message"]
        assert str(path) in answer.json()["error"]["message"]
        assert (await client.get("/v1/rollouts/r")).status_code == 404
        assert service.router.accounts.num_accepted == 0
        file.make_room()
        await post(client, request)
        service.router.accounts.check()
    assert service.router.accounts.num_accepted == 2


async def test_groups_are_delivered_without_room_and_recorded_once_there_is(path: Path) -> None:
    engine = FakeEngine("e")
    engine.unblocked.clear()
    async with over_held_ledger(path, engine) as (client, service, file):
        request = body("r", num_prompts=1)
        request["prompts"][0]["metadata"] = {"filler": "x" * 500_000}
        task = asyncio.create_task(post(client, request))
        await until(lambda: engine.num_running == 2, "the group to run")
        file.fill()
        engine.unblocked.set()
        response = await task
        scrape = (await client.get("/metrics")).text
        assert "\nslipstream_ledger_write_failures_total 0.0\n" not in scrape
        file.make_room()
        await until(lambda: service._ledger.stats.num_unwritten == 0, "the group to be recorded")
    contents = open_ledger_file(path).read()
    (kept,) = contents.ended
    assert [group.body.decode() for group in kept.groups] == [response.groups[0].model_dump_json()]
    assert (contents.books.num_delivered, contents.books.num_pending) == (2, 0)


async def test_a_failed_request_that_cannot_be_taken_on_again_stays_known(path: Path) -> None:
    engine = FakeEngine("e", fail_with=EngineError("bad step"))
    async with over_held_ledger(path, engine) as (client, service, file):
        request = body("r", num_prompts=1)
        await client.post("/v1/rollouts", json=request)
        await until(lambda: service._ledger.stats.num_unwritten == 0, "the end to be recorded")
        engine.fail_with = None
        file.may_write.clear()
        again = asyncio.create_task(client.post("/v1/rollouts", json=request))
        await until(lambda: service._ledger.stats.num_unwritten == 1, "the acceptance to wait")
        file._connection.execute("PRAGMA query_only = 1")
        file.may_write.set()
        answer = await again
        assert answer.status_code == 503
        assert "readonly database" in answer.json()["error"]["message"]
        assert (await client.get("/v1/rollouts/r")).json()["state"] == "failed"
        file._connection.execute("PRAGMA query_only = 0")
        await post(client, request)
        accounts = service.router.accounts
        accounts.check()
    assert (accounts.num_accepted, accounts.num_failed, accounts.num_delivered) == (4, 2, 2)


async def test_a_group_recorded_while_its_request_fails_counts_as_delivered_on_both_sides(
    path: Path,
) -> None:
    good, bad = FakeEngine("good"), FakeEngine("bad")
    good.unblocked.clear()
    bad.unblocked.clear()
    async with over_held_ledger(path, good, bad) as (client, service, file):
        task = asyncio.create_task(client.post("/v1/rollouts", json=body("r")))
        await until(lambda: good.num_running == bad.num_running == 2, "both groups to run")
        file.may_write.clear()
        good.unblocked.set()
        await until(lambda: service._ledger.stats.num_unwritten == 1, "the good group to wait")
        bad.fail_with = EngineError("bad step")
        bad.unblocked.set()
        await until(lambda: bad.num_running == 0, "the other group to fail")
        await asyncio.sleep(0.05)
        file.may_write.set()
        assert (await task).status_code == 500
        accounts = service.router.accounts
        assert (accounts.num_delivered, accounts.num_failed, accounts.num_cancelled) == (2, 2, 0)
    books = open_ledger_file(path).read().books
    assert (books.num_delivered, books.num_failed, books.num_cancelled) == (2, 2, 0)


async def test_without_a_ledger_nothing_is_written() -> None:
    service = fake_service()
    async with running(service) as client:
        await post(client, body("r"))
        assert "\nslipstream_ledger_commits_total 0.0\n" in (await client.get("/metrics")).text


async def test_a_ledger_in_use_keeps_a_second_server_from_starting(path: Path) -> None:
    async with over_held_ledger(path):
        with pytest.raises(Exception, match="another server has it open"):
            await RolloutLedger.open(path)
