"""What the poller hears decides which engines are given up; the service shows it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from rollout_server.health import HealthLimits
from rollout_server.health_watch import HealthWatch
from shared import metrics as names
from shared.pool_types import EngineHealth, Sickness
from shared.schemas.engines import EngineStatus
from shared.types import EngineState
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running, until

LIMITS = HealthLimits(progress_timeout_s=60.0, max_status_timeouts=2, status_timeout_s=5.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class StuckEngine(FakeEngine):
    """Answers with what a test wants, or not at all."""

    num_tokens = 10
    answers = True
    num_asked = 0
    num_watches = 0

    async def until_standstill(self) -> str:
        self.num_watches += 1
        return await super().until_standstill()

    async def status(self) -> EngineStatus:
        self.num_asked += 1
        if not self.answers:
            await asyncio.Event().wait()
        status = await super().status()
        update = {"num_running_reqs": 1, "num_generation_tokens": self.num_tokens}
        return status.model_copy(update=update)


async def test_an_engine_without_progress_is_condemned_once_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, engine = Clock(), StuckEngine("a")
    watch = HealthWatch(LIMITS, clock)
    for now_s in (0.0, 20.0, 59.0):
        clock.now_s = now_s
        watch.answered(engine, await engine.status())
    assert engine.state is EngineState.SERVING
    assert watch.health("a") is EngineHealth.SLOW
    status = await engine.status()
    clock.now_s = 60.0
    with caplog.at_level(logging.ERROR):
        watch.answered(engine, status)
        watch.answered(engine, status)  # one more was on its way
    assert engine.state is EngineState.DEAD
    assert "engine.progress_timeout_s 60" in (engine.error or "")
    assert watch.num_sick == {Sickness.NO_PROGRESS: 1}
    assert caplog.text.count("engine a is given up") == 1


async def test_a_late_answer_of_a_condemned_engine_changes_nothing() -> None:
    engine = StuckEngine("a")
    watch = HealthWatch(LIMITS)
    status = await engine.status()
    engine.condemn("its push failed")
    watch.answered(engine, status)
    watch.timed_out(engine)
    watch.timed_out(engine)
    assert engine.error == "its push failed"
    assert watch.num_sick == {}


async def test_an_engine_that_is_gone_is_forgotten() -> None:
    engine = StuckEngine("a")
    watch = HealthWatch(LIMITS)
    watch.timed_out(engine)
    assert watch.health("a") is EngineHealth.SLOW
    watch.forget_others([])
    assert watch.health("a") is EngineHealth.HEALTHY


async def test_the_poller_gives_up_an_engine_that_does_not_answer_and_no_other() -> None:
    hung, well = StuckEngine("hung"), FakeEngine("well")
    service = fake_service(
        [hung, well], engine={"status_timeout_s": 0.02, "max_status_timeouts": 2}
    )
    async with running(service) as client:
        await until(lambda: service.status_poller.kv_capacity_tokens("hung"), "a first answer")
        hung.answers = False
        await until(lambda: hung.state is EngineState.DEAD, "the engine to be given up")
        text = (await client.get("/metrics")).text
    assert "engine.max_status_timeouts" in (hung.error or "")
    assert well.state is EngineState.SERVING
    assert f'{names.ENGINES_GIVEN_UP}{{reason="no_status"}} 1.0' in text
    assert f'{names.ENGINES_GIVEN_UP}{{reason="no_progress"}} 0.0' in text


async def test_an_engine_that_freezes_is_given_up_before_its_answers_are_too_late() -> None:
    frozen, well = StuckEngine("frozen"), FakeEngine("well")
    service = fake_service([frozen, well])
    async with running(service) as client:
        await until(lambda: service.status_poller.kv_capacity_tokens("frozen"), "a first answer")
        frozen.answers = False
        frozen.frozen.set()
        well.frozen.set()  # it answers: nobody looks what its processes do
        await until(lambda: frozen.state is EngineState.DEAD, "the engine to be given up")
        text = (await client.get("/metrics")).text
    assert frozen.error == "it was frozen"
    assert well.state is EngineState.SERVING
    assert f'{names.ENGINES_GIVEN_UP}{{reason="frozen"}} 1.0' in text
    assert f'{names.ENGINES_GIVEN_UP}{{reason="no_status"}} 0.0' in text


async def test_an_engine_is_watched_on_from_one_late_answer_to_the_next() -> None:
    """A frozen engine is looked at for longer than one answer is waited for."""
    frozen = StuckEngine("frozen")
    service = fake_service([frozen], engine={"status_timeout_s": 0.02, "max_status_timeouts": 1000})
    async with running(service):
        await until(lambda: service.status_poller.kv_capacity_tokens("frozen"), "a first answer")
        frozen.answers = False
        num_asked = frozen.num_asked
        await until(lambda: frozen.num_asked > num_asked + 2, "late answers")
        num_watches = frozen.num_watches
        await until(lambda: frozen.num_asked > num_asked + 5, "more of them")
        assert frozen.num_watches == num_watches
        frozen.frozen.set()
        await until(lambda: frozen.state is EngineState.DEAD, "the engine to be given up")
    assert service.health.num_sick == {Sickness.FROZEN: 1}


async def test_one_that_freezes_in_a_push_is_left_to_the_push() -> None:
    engine = StuckEngine("a", state=EngineState.SYNCING)
    watch = HealthWatch(LIMITS)
    watch.froze(engine, "it was frozen")
    assert engine.state is EngineState.SYNCING
    assert watch.num_sick == {}


async def test_the_health_of_an_engine_is_listed() -> None:
    slow = StuckEngine("slow")
    service = fake_service([slow], engine={"progress_timeout_s": 3600.0})
    async with running(service) as client:
        await until(lambda: service.status_poller.kv_capacity_tokens("slow"), "a first answer")
        slow.answers = False
        service.health.timed_out(slow)
        answer = (await client.get("/v1/engines")).json()
        text = (await client.get("/metrics")).text
    assert [engine["health"] for engine in answer["engines"]] == ["slow"]
    assert f'{names.ENGINE_HEALTH}{{engine="slow",health="slow"}} 1.0' in text
