"""Accepted requests and finished groups outlive the server: what a restart finds, and goes on with.

A kill is a copy of the ledger's files taken while the first server still runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from rollout_server.rollouts.ledger import RolloutLedger
from rollout_server.service import RolloutService
from shared.errors import EngineError
from shared.schemas.rollouts import RolloutResponse
from shared.types import FinishReason
from tests.fakes.engine import FakeEngine
from tests.fakes.ledgers import as_after_a_kill
from tests.fakes.pool import FakePool
from tests.fakes.rollout_calls import body, lines, post
from tests.fakes.service import fake_service, running, until


class UnabortableEngine(FakeEngine):
    """Hears of aborts too late."""

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@asynccontextmanager
async def life(
    path: Path, *engines: FakeEngine, **settings: object
) -> AsyncIterator[tuple[httpx.AsyncClient, RolloutService]]:
    """A server over the ledger at ``path``, from its start to a clean stop."""
    pool = FakePool(engines or [FakeEngine("e", committed_version=2)], max_model_len=1024)
    ledger = await RolloutLedger.open(path)
    service = fake_service(pool=pool, ledger=ledger, server=settings)
    async with running(service) as client:
        yield client, service


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.sqlite3"


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Where the files go that a kill leaves."""
    return tmp_path / "killed"


def books(service: RolloutService) -> tuple[int, int, int, int, int]:
    """Accepted, delivered, failed, cancelled, pending."""
    it = service.router.accounts
    it.check()
    return it.num_accepted, it.num_delivered, it.num_failed, it.num_cancelled, it.num_pending


def versions(response: RolloutResponse) -> list[int]:
    """Of each group's first sample: the life that generated it."""
    return [group.samples[0].weight_versions[0].version for group in response.groups]


def slow_and_fast() -> tuple[FakeEngine, FakeEngine]:
    """The first group of a request of two gets stuck on the slow one."""
    slow, fast = FakeEngine("slow", committed_version=1), FakeEngine("fast", committed_version=1)
    slow.unblocked.clear()
    return slow, fast


async def test_a_finished_request_is_answered_again_and_never_generated_again(path: Path) -> None:
    async with life(path, FakeEngine("e", committed_version=1)) as (client, _):
        first = (await client.post("/v1/rollouts", json=body("r"))).content
    engine = FakeEngine("e", committed_version=2)
    async with life(path, engine) as (client, service):
        fetched = (await client.get("/v1/rollouts/r")).json()
        again = (await client.post("/v1/rollouts", json=body("r"))).content
        other = await client.post("/v1/rollouts", json=body("r", n=1))
        assert books(service) == (4, 4, 0, 0, 0)
    assert again == first
    assert fetched["state"] == "finished"
    assert fetched["result"] == RolloutResponse.model_validate_json(first).model_dump(mode="json")
    assert other.status_code == 409
    assert engine.requests == []


async def test_a_killed_server_goes_on_with_the_groups_that_are_missing(
    path: Path, killed: Path
) -> None:
    slow, fast = slow_and_fast()
    async with life(path, slow, fast) as (client, first_service):
        stream = asyncio.create_task(lines(client, body("r")))
        await until(lambda: first_service.router.accounts.num_delivered == 2, "a group")
        seen = b"".join(first_service.rollouts.find("r").kept.bodies_after(0))
        left = as_after_a_kill(path, killed)
        stream.cancel()
    engine = FakeEngine("e", committed_version=2)
    async with life(left, engine) as (client, service):
        streamed = await lines(client, body("r"))
        response = await post(client, body("r"))
        assert books(service) == (4, 4, 0, 0, 0)
        assert b"".join(service.rollouts.find("r").kept.bodies_after(0)).startswith(seen)
    assert [request.request_id for request in engine.requests] == ["r/group=0"]
    assert [line.group.prompt_index for line in streamed if line.group] == [1, 0]
    assert versions(response) == [2, 1]
    assert response.usage.num_completion_tokens == 24


async def test_an_accepted_request_is_run_though_nobody_asks(path: Path, killed: Path) -> None:
    engine = FakeEngine("e", committed_version=1)
    engine.unblocked.clear()
    async with life(path, engine) as (client, _):
        leaving = asyncio.create_task(post(client, body("r", num_prompts=3)))
        await until(lambda: engine.num_running == 6, "the request to run")
        left = as_after_a_kill(path, killed)
        leaving.cancel()
    async with life(left) as (client, service):
        await until(lambda: books(service) == (6, 6, 0, 0, 0), "the request to be run")
        assert (await client.get("/v1/rollouts/r")).json()["num_finished_groups"] == 3


async def test_a_request_without_a_name_is_not_run_on_for_nobody(path: Path, killed: Path) -> None:
    slow, fast = slow_and_fast()
    async with life(path, slow, fast) as (client, first_service):
        leaving = asyncio.create_task(post(client, body()))
        await until(lambda: first_service.router.accounts.num_delivered == 2, "a group")
        left = as_after_a_kill(path, killed)
        leaving.cancel()
    async with life(left, engine := FakeEngine("e")) as (_, service):
        await until(lambda: books(service) == (4, 2, 0, 2, 0), "the request to end")
    assert engine.requests == []


async def test_a_restart_after_the_last_group_and_before_the_end_generates_nothing(
    path: Path, killed: Path
) -> None:
    slow, fast = slow_and_fast()
    async with life(path, slow, fast) as (client, service):
        task = asyncio.create_task(post(client, body("r")))
        await until(lambda: service.router.accounts.num_delivered == 2, "a group")
        held = service.rollouts.find("r")
        slow.unblocked.set()
        first = await task
        del held
    # The end is not recorded in this copy: as if the kill had come right before.
    ledger = await RolloutLedger.open(path)
    ledger._writer._file._connection.execute("UPDATE requests SET state = 'accepted'")
    await ledger.close()
    engine = FakeEngine("e")
    async with life(path, engine) as (client, _):
        assert await post(client, body("r")) == first
    assert engine.requests == []


async def test_an_aborted_request_stays_ended_wherever_the_kill_struck(
    path: Path, killed: Path
) -> None:
    stuck = UnabortableEngine("stuck", committed_version=1)
    fast = FakeEngine("fast", committed_version=1)
    stuck.unblocked.clear()
    async with life(path, stuck, fast) as (client, service):
        task = asyncio.create_task(post(client, body("r")))
        await until(lambda: service.router.accounts.num_delivered == 2, "a group")
        deleting = asyncio.create_task(client.delete("/v1/rollouts/r"))
        await until(lambda: stuck.aborted, "the abort to reach the engine")
        left = as_after_a_kill(path, killed)
        stuck.unblocked.set()
        await deleting
        ended = await task
    engine = FakeEngine("e", committed_version=2)
    async with life(left, engine) as (client, service):
        await until(lambda: books(service) == (4, 2, 0, 2, 0), "the request to end")
        response = await post(client, body("r"))
        assert (await client.delete("/v1/rollouts/r")).json()["state"] == "finished"
    assert engine.requests == []
    reasons = [[s.finish_reason for s in group.samples] for group in response.groups]
    assert reasons == [[FinishReason.ABORT] * 2, [FinishReason.STOP] * 2]
    assert response.groups[1] == ended.groups[1]
    async with life(path, engine) as (client, _):
        assert await post(client, body("r")) == ended
    assert engine.requests == []


async def test_a_failed_request_is_known_and_goes_on_when_posted_again(path: Path) -> None:
    good, bad = FakeEngine("good", committed_version=1), FakeEngine("bad")
    bad.unblocked.clear()
    async with life(path, bad, good) as (client, service):
        task = asyncio.create_task(lines(client, body("r")))
        await until(lambda: service.router.accounts.num_delivered == 2, "the good group")
        bad.fail_with = EngineError("bad step")
        bad.unblocked.set()
        before = await task
    async with life(path) as (client, service):
        assert books(service) == (4, 2, 2, 0, 0)
        status = (await client.get("/v1/rollouts/r")).json()
        assert (status["state"], status["error"]["code"]) == ("failed", "engine_error")
        response = await post(client, body("r"))
        assert books(service) == (6, 4, 2, 0, 0)
    assert response.groups[1] == before[0].group
    assert versions(response) == [2, 1]
    async with life(path) as (client, service):
        assert await post(client, body("r")) == response
        assert books(service) == (6, 4, 2, 0, 0)


async def test_a_clean_stop_leaves_running_requests_to_the_next_process(path: Path) -> None:
    slow, fast = slow_and_fast()
    async with life(path, slow, fast) as (client, service):
        task = asyncio.create_task(client.post("/v1/rollouts", json=body("r")))
        await until(lambda: service.router.accounts.num_delivered == 2, "a group")
        await service.close()
        answer = await task
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await client.get("/v1/rollouts/r")).status_code == 503
    async with life(path) as (client, service):
        assert versions(await post(client, body("r"))) == [2, 1]
        assert books(service) == (4, 4, 0, 0, 0)


async def test_what_is_no_longer_kept_is_not_in_the_ledger_either(path: Path) -> None:
    async with life(path, result_ttl_s=0.01) as (client, _):
        await post(client, body("r"))
        await asyncio.sleep(0.05)
        assert (await client.get("/v1/rollouts/r")).status_code == 404
    async with life(path) as (client, service):
        assert (await client.get("/v1/rollouts/r")).status_code == 404
        assert books(service) == (4, 4, 0, 0, 0)


async def test_results_above_the_bound_are_not_taken_up(path: Path) -> None:
    metadata = {"filler": "x" * 300_000}
    request = {"prompts": [{"prompt": "q", "metadata": metadata}], "n": 1}
    async with life(path) as (client, _):
        for index in range(6):
            await post(client, {**request, "request_id": f"r{index}"})
    for _ in range(2):
        async with life(path, result_store_mib=1) as (client, _service):
            found = [(await client.get(f"/v1/rollouts/r{index}")).status_code for index in range(6)]
            assert found == [404, 404, 404, 200, 200, 200], "the last ones to end"


async def test_what_cannot_be_done_any_more_fails_and_says_why(path: Path, killed: Path) -> None:
    engine = FakeEngine("e")
    engine.unblocked.clear()
    request = body("r", sampling={"max_tokens": 500})
    async with life(path, engine) as (client, _):
        leaving = asyncio.create_task(client.post("/v1/rollouts", json=request))
        await until(lambda: engine.num_running == 4, "the request to run")
        left = as_after_a_kill(path, killed)
        leaving.cancel()
    for _ in range(2):
        ledger = await RolloutLedger.open(left)
        service = fake_service(pool=FakePool([engine], max_model_len=100), ledger=ledger)
        async with running(service) as client:
            status = (await client.get("/v1/rollouts/r")).json()
            assert (status["state"], status["error"]["code"]) == ("failed", "invalid_request")
            assert "model.max_model_len 100" in status["error"]["message"]
            assert books(service) == (4, 0, 4, 0, 0)


async def test_a_request_of_another_versions_words_is_given_up_loudly(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with life(path) as (client, _):
        await post(client, body("a"))
        await post(client, body("b"))
    ledger = await RolloutLedger.open(path)
    connection = ledger._writer._file._connection
    connection.execute("UPDATE requests SET body = '{\"unheard_of\": 1}' WHERE request_id = 'a'")
    connection.execute("UPDATE requests SET digest = x'00' WHERE request_id = 'b'")
    await ledger.close()
    engine = FakeEngine("e")
    async with life(path, engine) as (client, service):
        assert "rollout a is not taken up again: its body cannot be read" in caplog.text
        assert (await client.get("/v1/rollouts/a")).status_code == 404
        # The digest is made anew: another version may write the same request in other words.
        await post(client, body("b"))
        assert books(service) == (8, 8, 0, 0, 0)
    assert engine.requests == []


async def test_books_go_on_over_restarts_as_metrics(path: Path) -> None:
    for round_ in (1, 2, 3):
        async with life(path) as (client, _):
            await post(client, body(f"r{round_}"))
            scrape = (await client.get("/metrics")).text
        for line in (
            f"slipstream_samples_accepted_total {4.0 * round_}",
            f"slipstream_samples_delivered_total {4.0 * round_}",
            "slipstream_samples_failed_total 0.0",
            "slipstream_samples_cancelled_total 0.0",
            "slipstream_pending_samples 0.0",
            "slipstream_samples_unaccounted 0.0",
        ):
            assert f"\n{line}\n" in scrape
