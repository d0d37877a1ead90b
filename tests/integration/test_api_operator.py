"""Draining, removing, pausing and resuming over fake engines."""

from __future__ import annotations

import asyncio

import pytest

from rollout_server.service import RolloutService
from shared.errors import EngineDeadError, EngineError
from shared.types import EngineState, PauseMode
from tests.fakes.engine import FakeEngine
from tests.fakes.pool import FakePool
from tests.fakes.service import fake_service, running, until

BODY = {"prompts": [{"prompt": "a"}], "n": 2, "sampling": {"max_tokens": 8}}


def three_engines() -> list[FakeEngine]:
    return [FakeEngine(name) for name in ("a", "b", "c")]


async def test_a_pause_holds_generation_until_the_resume_and_nothing_is_refused() -> None:
    engines = three_engines()
    async with running(fake_service(engines)) as client:
        answer = (await client.post("/v1/pause", json={})).json()
        assert answer["pause_mode"] == "keep"
        assert {engine["state"] for engine in answer["engines"]} == {"paused"}
        rollout = asyncio.create_task(client.post("/v1/rollouts", json=BODY))
        await until(lambda: any(engine.requests for engine in engines), "the paused engine has it")
        assert not rollout.done()
        assert (await client.get("/v1/engines")).json()["pause_mode"] == "keep"
        resumed = (await client.post("/v1/resume")).json()
        assert resumed["pause_mode"] is None
        assert {engine["state"] for engine in resumed["engines"]} == {"serving"}
        assert len((await rollout).json()["groups"][0]["samples"]) == 2
    assert [engine.pauses for engine in engines] == [[PauseMode.KEEP, None]] * 3


async def test_a_pause_by_abort_returns_what_ran_as_aborted() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    async with running(fake_service([engine])) as client:
        rollout = asyncio.create_task(client.post("/v1/rollouts", json=BODY))
        await until(lambda: engine.num_running == 2, "both samples run")
        await client.post("/v1/pause", json={"mode": "abort"})
        (group,) = (await rollout).json()["groups"]
    assert {sample["finish_reason"] for sample in group["samples"]} == {"abort"}


async def test_pausing_twice_and_resuming_without_a_pause_are_no_errors() -> None:
    async with running(fake_service(three_engines())) as client:
        assert (await client.post("/v1/resume")).status_code == 200
        assert (await client.post("/v1/pause", json={"mode": "keep"})).status_code == 200
        again = await client.post("/v1/pause", json={"mode": "wait"})
        assert again.json()["pause_mode"] == "wait"
        bad = await client.post("/v1/pause", json={"mode": "stop"})
    assert bad.status_code == 422
    assert bad.json()["error"]["param"] == "mode"


async def test_an_engine_that_joins_a_paused_service_does_not_generate() -> None:
    service = fake_service(three_engines())
    joiner = FakeEngine("joiner", state=EngineState.STARTING)
    await service.generation.apply_to(joiner)
    assert joiner.pauses == []
    await service.generation.pause(PauseMode.KEEP)
    await service.generation.apply_to(joiner)
    assert joiner.pauses == [PauseMode.KEEP]


async def test_a_resume_while_a_joiner_is_being_paused_reaches_it() -> None:
    service = fake_service([])

    class SlowToPause(FakeEngine):
        async def pause_generation(self, mode: PauseMode) -> None:
            await super().pause_generation(mode)
            await service.generation.resume()

    joiner = SlowToPause("joiner", state=EngineState.STARTING)
    await service.generation.pause(PauseMode.KEEP)
    await service.generation.apply_to(joiner)
    assert joiner.pauses == [PauseMode.KEEP, None]


async def test_leavers_and_starters_are_left_alone_and_the_dead_do_not_fail_a_pause() -> None:
    leaving = FakeEngine("leaving", state=EngineState.DRAINING)
    starting = FakeEngine("starting", state=EngineState.STARTING)
    dying = FakeEngine("dying", fail_with=EngineDeadError("its process is gone"))
    well = FakeEngine("well")
    service = fake_service([leaving, starting, dying, well])
    await service.generation.pause(PauseMode.KEEP)
    assert [len(engine.pauses) for engine in (leaving, starting, dying, well)] == [0, 0, 0, 1]


async def test_an_engine_that_was_paused_and_is_drained_since_is_resumed() -> None:
    engine = FakeEngine("a")
    service = fake_service([engine])
    await service.generation.pause(PauseMode.KEEP)
    engine.state = EngineState.DRAINING
    await service.generation.resume()
    assert engine.pauses == [PauseMode.KEEP, None], "or what it holds would never end"


async def test_an_engine_that_does_not_stop_fails_the_answer_and_the_pause_stands() -> None:
    stuck = FakeEngine("stuck", fail_with=EngineError("took longer than 30 s to pause"))
    well = FakeEngine("well")
    async with running(fake_service([stuck, well])) as client:
        answer = await client.post("/v1/pause", json={})
        assert answer.status_code == 500
        assert "took longer than 30 s" in answer.json()["error"]["message"]
        assert (await client.get("/v1/engines")).json()["pause_mode"] == "keep"
    assert well.pauses == [PauseMode.KEEP]


def pool_of(service: RolloutService) -> FakePool:
    pool = service._pool
    assert isinstance(pool, FakePool)
    return pool


@pytest.mark.parametrize("replace", [True, False])
async def test_a_drained_engine_gets_no_new_groups(replace: bool) -> None:
    engines = three_engines()
    service = fake_service(engines)
    async with running(service) as client:
        answer = await client.post("/v1/engines/b/drain", json={"replace": replace})
        assert answer.status_code == 200
        states = {engine["engine_id"]: engine["state"] for engine in answer.json()["engines"]}
        assert states["b"] == "draining"
        assert answer.json()["target_count"] == (3 if replace else 2)
        for _ in range(6):
            await client.post("/v1/rollouts", json=BODY)
    assert engines[1].requests == []
    assert len(pool_of(service).members) == (4 if replace else 3)


async def test_a_removed_engines_group_is_generated_elsewhere() -> None:
    engines = [FakeEngine("a")]
    engines[0].unblocked.clear()
    service = fake_service(engines)
    async with running(service) as client:
        rollout = asyncio.create_task(client.post("/v1/rollouts", json=BODY))
        await until(lambda: engines[0].num_running == 2, "both samples run")
        gone = await client.delete("/v1/engines/a")
        assert [engine["engine_id"] for engine in gone.json()["engines"]] == ["replacement-0"]
        answer = (await rollout).json()
    assert len(answer["groups"][0]["samples"]) == 2
    assert {s["engine_id"] for g in answer["groups"] for s in g["samples"]} == {"replacement-0"}


async def test_an_unknown_engine_is_a_404_for_both() -> None:
    async with running(fake_service(three_engines())) as client:
        drained = await client.post("/v1/engines/x/drain", json={})
        removed = await client.delete("/v1/engines/x", params={"replace": "false"})
    for answer in (drained, removed):
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "engine_id"
