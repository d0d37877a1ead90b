"""SIGTERM: new requests are refused, accepted ones finish, and waiting has an end."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from rollout_server.draining import (
    STOP_TRANSITIONS,
    StopSignals,
    StopWish,
    after_signal,
    drain,
)
from shared import metrics as names
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running, until

BODY = {"prompts": [{"prompt": "a"}], "n": 2}
CHAT = {"model": "models/tiny", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "models/tiny", "prompt": "a"}


@pytest.mark.parametrize("wish", list(StopWish))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_only_a_first_sigterm_drains_and_every_other_signal_stops(
    wish: StopWish, number: signal.Signals
) -> None:
    drains = wish is StopWish.RUN and number is signal.SIGTERM
    new = after_signal(wish, number)
    assert new is (StopWish.DRAIN if drains else StopWish.STOP)
    assert new is wish or new in STOP_TRANSITIONS[wish]


async def test_real_signals_arrive() -> None:
    signals = StopSignals()
    signals.listen()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(signals.wait(), 10)
        assert signals.wish is StopWish.DRAIN
        os.kill(os.getpid(), signal.SIGINT)
        await signals.wait_at_once(10)
        await until(lambda: signals.wish is StopWish.STOP, "the second signal")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_draining_server_finishes_what_it_has_and_refuses_what_is_new() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service = fake_service([engine])
    async with running(service) as client:
        first = asyncio.create_task(client.post("/v1/rollouts", json=BODY | {"request_id": "one"}))
        await until(lambda: engine.num_running == 2, "the group to be generated")
        draining = asyncio.create_task(drain(service, StopSignals(), 3600.0))
        await until(lambda: service.router.accounts.refusal is not None, "the drain to begin")
        refused = [
            await client.post(path, json=body)
            for path, body in (
                ("/v1/rollouts", BODY),
                ("/v1/completions", COMPLETION),
                ("/v1/chat/completions", CHAT),
            )
        ]
        ready = await client.get("/readyz")
        again = asyncio.create_task(client.post("/v1/rollouts", json=BODY | {"request_id": "one"}))
        text = (await client.get("/metrics")).text
        state = (await client.get("/v1/rollouts/one")).json()["state"]
        assert not draining.done()
        engine.unblocked.set()
        await asyncio.wait_for(draining, 10)
        answers = [await first, await again]
        fetched = await client.get("/v1/rollouts/one")
    for answer in (*refused, ready):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "draining" in answer.json()["error"]["message"]
    assert [answer.status_code for answer in answers] == [200, 200], "one request, asked for twice"
    assert answers[0].content == answers[1].content
    assert (state, fetched.json()["state"]) == ("running", "finished")
    assert f"{names.DRAINING} 1.0" in text


async def test_a_drain_ends_with_its_time(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service = fake_service([engine])
    async with running(service) as client:
        asked = asyncio.create_task(client.post("/v1/rollouts", json=BODY))
        await until(lambda: engine.num_running == 2, "the group to be generated")
        await drain(service, StopSignals(), 0.0)
        assert "2 samples were not finished" in caplog.text
        await service.rollouts.close(5.0)
        await asked


async def test_a_second_signal_ends_a_drain() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service, signals = fake_service([engine]), StopSignals()
    async with running(service) as client:
        asked = asyncio.create_task(client.post("/v1/rollouts", json=BODY))
        await until(lambda: engine.num_running == 2, "the group to be generated")
        signals.receive(signal.SIGTERM)
        draining = asyncio.create_task(drain(service, signals, 3600.0))
        await until(lambda: service.router.accounts.refusal is not None, "the drain to begin")
        signals.receive(signal.SIGTERM)
        await asyncio.wait_for(draining, 10)
        assert engine.num_running == 2
        await service.rollouts.close(5.0)
        await asked


async def test_a_server_with_nothing_to_do_does_not_wait() -> None:
    service = fake_service()
    async with running(service):
        await asyncio.wait_for(drain(service, StopSignals(), 3600.0), 10)
