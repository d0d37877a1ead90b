"""Control plane and operations over fake engines."""

from __future__ import annotations

import asyncio
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared import metrics as names
from shared.errors import EngineDeadError
from shared.schemas.engines import EnginesResponse
from shared.schemas.speculation import SpeculationChange
from shared.types import EngineState, SpeculationMode
from tests.fakes.engine import FakeEngine
from tests.fakes.service import FakeCoordinator, fake_service, running, until

MANIFEST = {
    "segment": "slipstream-1.safetensors",
    "tensors": [{"name": "w", "dtype": "F32", "shape": [1], "num_bytes": 4, "digest": "00"}],
}


def samples_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_speculation_patch_reaches_engines_and_shows_in_the_answer() -> None:
    engine = FakeEngine("a")
    service = fake_service([engine])
    async with running(service) as client:
        answer = await client.patch(
            "/v1/speculation", json={"mode": "always", "num_speculative_tokens": 2}
        )
        read = (await client.get("/v1/speculation", params={"since_step": 8})).json()
    assert answer.status_code == 200
    assert answer.json()["policy"]["mode"] == "always"
    assert engine.patches[-1].num_speculative_tokens == 2
    assert service.speculation_policy.mode is SpeculationMode.ALWAYS
    assert [step["step"] for step in read["engines"][0]["history"]] == [9, 10]
    assert read["max_num_speculative_tokens"] == 8


async def test_one_engine_gets_settings_of_its_own_and_the_log_names_the_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "rollout_server.live_speculation")
    engines = [FakeEngine("a"), FakeEngine("b")]
    async with running(fake_service(engines)) as client:
        answer = await client.patch(
            "/v1/speculation",
            json={"mode": "off", "engine_ids": ["b"]},
            headers={"X-Request-Id": "audit-1"},
        )
        schema = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert answer.json()["overrides"]["b"]["mode"] == "off"
    assert answer.json()["policy"]["mode"] == "adaptive"
    assert [len(engine.patches) for engine in engines] == [0, 1]
    assert "request audit-1 from 127.0.0.1: mode adaptive -> off on b" in caplog.text
    # The examples of the page are requests that the server takes.
    for example in schema["SpeculationChange"]["examples"]:
        SpeculationChange.model_validate(example)
    for field in schema["SpeculationChange"]["properties"].values():
        assert field["description"]


async def test_engines_are_listed_with_state_load_and_the_reason_of_death() -> None:
    alive = FakeEngine("alive")
    doomed = FakeEngine("doomed", fail_with=EngineDeadError("its process is gone"))
    starting = FakeEngine("starting", state=EngineState.STARTING)
    async with running(fake_service([alive, doomed, starting])) as client:
        answer = EnginesResponse(target_count=0, engines=[])

        async def read() -> EnginesResponse:
            return EnginesResponse.model_validate_json((await client.get("/v1/engines")).content)

        for _ in range(500):
            answer = await read()
            if answer.engines[0].kv_cache_usage and answer.engines[1].error:
                break
            await asyncio.sleep(0.005)
    by_id = {engine.engine_id: engine for engine in answer.engines}
    assert by_id["alive"].state is EngineState.SERVING
    assert by_id["doomed"].state is EngineState.DEAD
    assert by_id["doomed"].error == "its process is gone"
    assert by_id["starting"].state is EngineState.STARTING
    assert answer.target_count == 3


async def test_scaling_answers_with_the_new_target() -> None:
    async with running(fake_service()) as client:
        answer = await client.put("/v1/engines", json={"count": 3})
        assert answer.json()["target_count"] == 3
        assert len(answer.json()["engines"]) == 3


async def test_a_push_commits_and_a_wrong_base_is_a_conflict() -> None:
    async with running(fake_service(coordinator=FakeCoordinator(4))) as client:
        push = {"version": 5, "base_version": 4, "manifest": MANIFEST}
        assert (await client.post("/v1/weights", json=push)).json()["version"] == 5
        assert (await client.post("/v1/weights", json=push)).status_code == 409
        assert (await client.get("/v1/weights")).json()["committed_version"] == 5
        values = samples_of((await client.get("/metrics")).text)
    assert values[(names.COMMITTED_VERSION, ())] == 5
    assert values[(names.PUSHES, (("outcome", "committed"),))] == 1
    assert values[(names.PUSHES, (("outcome", "refused"),))] == 1


@pytest.mark.parametrize("state", list(EngineState))
async def test_readiness_follows_the_engines_and_liveness_does_not(state: EngineState) -> None:
    async with running(fake_service([FakeEngine("a", state=state)])) as client:
        ready = await client.get("/readyz")
        assert (await client.get("/livez")).status_code == 200
    if state in (EngineState.SERVING, EngineState.PAUSED, EngineState.SYNCING):
        assert ready.status_code == 200
        assert ready.json()["num_ready_engines"] == 1
    else:
        assert ready.status_code == 503
        assert ready.headers["retry-after"] == "1"
        assert f"a {state.value}" in ready.json()["error"]["message"]


async def test_version_names_model_and_rewards() -> None:
    async with running(fake_service()) as client:
        answer = (await client.get("/version")).json()
    assert answer["model"] == "models/tiny"
    assert answer["rewards"] == ["length"]


async def test_every_metric_exists_from_the_first_scrape_and_counts() -> None:
    engine = FakeEngine("a")
    service = fake_service([engine])
    async with running(service) as client:
        await until(service.status_poller.speculation, "the first poll")
        await client.get("/livez")
        text = (await client.get("/metrics")).text
        exposed = set(re.findall(r"^(slipstream_\w+)", text, re.MULTILINE))
        for constant, name in vars(names).items():
            if isinstance(name, str) and name.startswith(names.PREFIX) and constant != "PREFIX":
                assert exposed & {name, f"{name}_count"}, f"{name} is not exposed"
        before = samples_of(text)
        assert before[(names.SAMPLES_DELIVERED, ())] == 0
        request = {"prompts": [{"prompt": "a"}], "n": 3, "reward": {"name": "length"}}
        await client.post("/v1/rollouts", json=request)
        await client.post("/v1/rollouts", json={})
        await client.get("/never/heard/of")
        after = samples_of((await client.get("/metrics")).text)
    assert after[(names.SAMPLES_ACCEPTED, ())] == 3
    assert after[(names.SAMPLES_DELIVERED, ())] == 3
    assert after[(names.COMPLETION_TOKENS, ())] == 18
    assert after[(names.DRAFT_TOKENS, ())] == 12
    assert after[(names.ACCEPTED_TOKENS, ())] == 9
    assert after[(names.REWARDS, (("status", "ok"),))] == 3
    assert after[(names.ENGINE_KV_CACHE_USAGE, (("engine", "a"),))] == 0.25
    assert after[(names.ENGINE_SPECULATIVE_TOKENS, (("engine", "a"),))] == 4
    assert after[(names.ENGINE_STATE, (("engine", "a"), ("state", "serving")))] == 1
    requests = names.HTTP_REQUESTS
    for route, status in (("/v1/rollouts", "200"), ("/v1/rollouts", "422"), ("unmatched", "404")):
        method = "GET" if route == "unmatched" else "POST"
        labels = (("method", method), ("route", route), ("status", status))
        assert after[(requests, labels)] == 1


async def test_request_ids_are_echoed_or_made_up() -> None:
    async with running(fake_service()) as client:
        echoed = await client.get("/livez", headers={"x-request-id": "abc-1"})
        refused = await client.get("/nope", headers={"x-request-id": "abc-2"})
        odd = await client.get("/livez", headers={"x-request-id": "x" * 500})
        none = await client.get("/livez")
    assert echoed.headers["x-request-id"] == "abc-1"
    assert refused.headers["x-request-id"] == "abc-2"
    assert len(odd.headers["x-request-id"]) == 32
    assert none.headers["x-request-id"] != odd.headers["x-request-id"]


async def test_a_bug_is_a_500_that_tells_nothing_of_the_inside() -> None:
    service = fake_service()
    service.reward_names = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    async with running(service) as client:
        answer = await client.get("/version", headers={"x-request-id": "abc"})
        assert (await client.get("/livez")).status_code == 200
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "division" not in answer.text
    assert answer.headers["x-request-id"] == "abc"


async def test_the_openapi_document_describes_bodies_and_answers() -> None:
    async with running(fake_service()) as client:
        document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/([\w-]+)", str(document)))
    assert references <= schemas.keys()
    assert {
        "RolloutRequest",
        "RolloutResponse",
        "PublishRequest",
        "ErrorResponse",
    } <= references | {"ErrorResponse"}
