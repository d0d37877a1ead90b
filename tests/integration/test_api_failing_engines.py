"""Engines that fail what they are given, and engines that are late, over the API."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from rollout_server.router.stragglers import MIN_GROUPS
from shared.errors import EngineError
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running, until
from tests.fakes.walking_engine import WalkingEngine, completion
from tests.integration.test_api_metrics import values_of

BODY: dict[str, Any] = {"prompts": [{"prompt": "a"}], "n": 2, "sampling": {"max_tokens": 8}}


async def circuits(client: httpx.AsyncClient) -> dict[str, str]:
    answer = (await client.get("/v1/engines")).json()
    return {engine["engine_id"]: engine["circuit"] for engine in answer["engines"]}


async def test_an_engine_that_fails_its_groups_is_seen_and_passed_over() -> None:
    engines = [FakeEngine("a"), FakeEngine("b")]
    settings = {"circuit_breaker": {"num_failures": 1, "open_s": 60}}
    async with running(fake_service(engines, server=settings)) as client:
        assert await circuits(client) == {"a": "closed", "b": "closed"}
        engines[0].fail_with = EngineError("bad step")
        assert (await client.post("/v1/rollouts", json=BODY)).status_code == 500
        for _ in range(4):
            assert (await client.post("/v1/rollouts", json=BODY)).status_code == 200
        assert await circuits(client) == {"a": "open", "b": "closed"}
        values = values_of((await client.get("/metrics")).text)
    assert len(engines[0].requests) == 1
    assert values["slipstream_circuit_openings_total",] == 1
    assert values["slipstream_engine_circuit", "open", "a"] == 1
    assert values["slipstream_engine_circuit", "closed", "a"] == 0
    assert values["slipstream_engine_circuit", "closed", "b"] == 1


async def test_late_samples_are_delivered_once_from_another_engine() -> None:
    stuck, quick = WalkingEngine("a", stalls_after=2), WalkingEngine("b")
    settings = {
        "stragglers": {"enabled": True, "patience": 1.0},
        "progress_interval_s": 0.01,
    }
    service = fake_service([stuck, quick], server=settings)
    body = BODY | {"sampling": {"max_tokens": 32}, "request_id": "late"}
    body["prompts"] = [{"prompt_token_ids": late_prompt()}]
    async with running(service) as client:
        late = asyncio.create_task(client.post("/v1/rollouts", json=body))
        await until(lambda: stuck.num_running == 2, "it to be on a")
        for _ in range(MIN_GROUPS):
            assert (await client.post("/v1/rollouts", json=BODY)).status_code == 200
        (group,) = (await late).json()["groups"]
        values = values_of((await client.get("/metrics")).text)
        assert service.router.accounts.num_delivered == 2 + 2 * MIN_GROUPS
    assert [s["token_ids"] for s in group["samples"]] == [completion(late_prompt(), 32)] * 2
    assert {s["engine_id"] for s in group["samples"]} == {"b"}
    assert values["slipstream_straggler_handovers_total",] == 2
    assert values["slipstream_straggler_recomputed_tokens_total",] >= 2 * len(late_prompt())
    assert values["slipstream_samples_unaccounted",] == 0


def late_prompt() -> list[int]:
    """With a completion that does not end before its engine is stuck."""
    return next([1, n] for n in range(100) if len(completion([1, n], 32)) > 8)
