"""/metrics of the app over fake engines: what is counted, and what cannot hold it up."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared import metrics as names
from shared.errors import EngineError, WeightCommitError
from shared.schemas.weights import (
    AuditResponse,
    EngineAudit,
    EngineCommitTimings,
    PublishRequest,
    PublishResponse,
)
from shared.types import EngineState
from tests.fakes.engine import FakeEngine
from tests.fakes.service import FakeCoordinator, FakeScorer, fake_service, running, until
from tests.support.scrape import PUSH, ROLLOUT, vllm_like_registry

Values = dict[tuple[str, ...], float]
COMPLETION = {"model": "models/tiny", "prompt": "a", "n": 2, "max_tokens": 6}


def values_of(text: str) -> Values:
    """Values by name and label values, in order of the labels' names."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class _Coordinator(FakeCoordinator):
    """Answers with phases, and again with the same answer; refuses version 13."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: PublishResponse | None = None
        self.unblocked = asyncio.Event()
        self.unblocked.set()

    async def publish(self, request: PublishRequest) -> PublishResponse:
        await self.unblocked.wait()
        if request.version == 13:
            raise WeightCommitError("an engine failed")
        if self.answer is not None and self.answer.version == request.version:
            return self.answer
        await super().publish(request)
        timings = EngineCommitTimings(
            engine_id="engine-0",
            stage_s=0.1,
            pause_s=0.1,
            load_s=0.2,
            requantize_s=0.1,
            resume_s=0.1,
            paused_s=0.5,
        )
        self.answer = PublishResponse(
            version=request.version,
            verify_s=0.25,
            total_s=1.0,
            num_bytes=4000,
            phases_s={"verifying": 0.25, "staging": 0.25, "loading": 0.5},
            engines=[timings],
            engines_removed=["engine-9"],
        )
        return self.answer

    async def audit(self) -> AuditResponse:
        damaged = EngineAudit(
            engine_id="e", version=1, num_equal=1, num_skipped=0, different=["w"], audit_s=2.0
        )
        report = AuditResponse(version=1, is_intact=False, engines=[damaged], engines_removed=["e"])
        self.on_audit(report)
        return report


async def test_vllms_metrics_come_with_the_engines_id_as_their_engine_label() -> None:
    engines = [FakeEngine(name, vllm_registry=vllm_like_registry()) for name in ("a", "b")]
    async with running(fake_service(engines)) as client:
        text = (await client.get("/metrics")).text
    values = values_of(text)
    for engine in "ab":
        assert values["vllm:num_requests_running", engine, "0", "m"] == 3
        assert values["vllm:prompt_tokens_total", engine, "0", "m"] == 7
        assert values["vllm:time_to_first_token_seconds_bucket", engine, "0", "1.0", "m"] == 1
        assert values[names.ENGINE_METRICS_AGE, engine] < 10
    assert text.count("# TYPE vllm:prompt_tokens_total counter") == 1
    assert "python_gc" not in text
    assert "vllm:prompt_tokens_created" not in text


async def test_an_engine_that_hangs_delays_no_scrape_and_shows_its_last_metrics() -> None:
    hung = FakeEngine("hung", vllm_registry=vllm_like_registry())
    well = FakeEngine("well", vllm_registry=vllm_like_registry())
    service = fake_service([hung, well], server={"engine_metrics_timeout_s": 0.05})
    async with running(service) as client:
        await client.get("/metrics")
        service._scraper._last = {
            name: (then_s - 10, families)
            for name, (then_s, families) in service._scraper._last.items()
        }
        hung.metrics_unblocked.clear()
        values = values_of((await client.get("/metrics")).text)  # ends, though hung never answers
        again = values_of((await client.get("/metrics")).text)
        assert hung.num_metrics_asked == 2, "a hung engine is not asked again by each scrape"
    for seen in (values, again):
        assert seen["vllm:num_requests_running", "hung", "0", "m"] == 3
        assert seen[names.ENGINE_METRICS_AGE, "hung"] > 9
        assert seen[names.ENGINE_METRICS_AGE, "well"] < 9


async def test_an_engine_that_fails_or_starts_costs_only_its_own_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines = [
        FakeEngine("failing", vllm_registry=vllm_like_registry()),
        FakeEngine("starting", EngineState.STARTING, vllm_registry=vllm_like_registry()),
        FakeEngine("well", vllm_registry=vllm_like_registry()),
    ]
    engines[0].fail_with = EngineError("busy")
    async with running(fake_service(engines)) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    shown = {key[1] for key in values_of(answer.text) if key[0] == "vllm:num_requests_running"}
    assert shown == {"well"}
    assert "metrics of engine failing failed: busy" in caplog.text


async def test_metrics_of_an_engine_that_is_gone_are_forgotten() -> None:
    engines = [FakeEngine(name, vllm_registry=vllm_like_registry()) for name in ("a", "b")]
    service = fake_service(engines)
    async with running(service) as client:
        await client.get("/metrics")
        service._pool.members.remove(engines[0])
        values = values_of((await client.get("/metrics")).text)
    assert {key[1] for key in values if key[0] == "vllm:num_requests_running"} == {"b"}


async def test_a_group_is_timed_from_acceptance_to_its_scores() -> None:
    async with running(fake_service()) as client:
        await client.post("/v1/rollouts", json=ROLLOUT)
        values = values_of((await client.get("/metrics")).text)
    for name in (names.QUEUE_TIME, names.TIME_TO_FIRST_TOKEN, names.GENERATE_TIME):
        assert values[f"{name}_count",] == 1
    assert values[f"{names.GROUP_TIME}_count",] == 1
    assert values[f"{names.TIME_PER_OUTPUT_TOKEN}_sum",] == pytest.approx(0.001)
    assert values[f"{names.TIME_TO_FIRST_TOKEN}_sum",] >= 0.004
    assert values[f"{names.SCORING_TIME}_count",] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_completions_are_timed_whether_streamed_or_not(stream: bool) -> None:
    async with running(fake_service()) as client:
        answer = await client.post("/v1/completions", json={**COMPLETION, "stream": stream})
        assert answer.status_code == 200
        values = values_of((await client.get("/metrics")).text)
    for name in (names.QUEUE_TIME, names.TIME_TO_FIRST_TOKEN, names.TIME_PER_OUTPUT_TOKEN):
        assert values[f"{name}_count",] == 1
    assert values[f"{names.GROUP_TIME}_count",] == 0  # of rollouts only: nothing is scored


async def test_what_waits_is_shown_with_its_limit() -> None:
    scorer = FakeScorer()
    scorer.num_queued, scorer.num_worker_restarts = 3, 2
    service = fake_service([], scorer=scorer, server={"limits": {"max_pending_samples": 5}})
    async with running(service) as client:
        body = {**ROLLOUT, "request_id": "waits", "stream": True}
        posted = asyncio.create_task(client.post("/v1/rollouts", json=body))
        await until(lambda: service.router.num_queued_samples == 2, "the group to wait")
        overloaded = {"prompts": [{"prompt": "b"}], "n": 4}
        assert (await client.post("/v1/rollouts", json=overloaded)).status_code == 429
        values = values_of((await client.get("/metrics")).text)
        await client.delete("/v1/rollouts/waits")
        await posted
    assert values[names.PENDING_SAMPLES_LIMIT,] == 5
    assert values[names.LONGEST_WAIT,] > 0
    assert values[names.HTTP_IN_PROGRESS,] == 2  # the rollout and the scrape
    assert values[names.SCORING_QUEUED,] == 3
    assert values[names.SCORING_RESTARTS,] == 2
    assert values[names.ERRORS, "overloaded"] == 1


async def test_errors_are_counted_by_code_inside_streams_too() -> None:
    engine = FakeEngine("a", fail_with=EngineError("broken"))
    async with running(fake_service([engine])) as client:
        await client.post("/v1/rollouts", json={**ROLLOUT, "stream": True})
        await client.post("/v1/completions", json={**COMPLETION, "stream": True})
        await client.post("/v1/rollouts", json={**ROLLOUT, "request_id": "x"})
        await client.get("/v1/rollouts/x")  # shows the error, and is none itself
        await client.post("/v1/rollouts", json={})
        await client.get("/never/heard/of")
        values = values_of((await client.get("/metrics")).text)
    assert values[names.ERRORS, "engine_error"] == 3
    assert values[names.ERRORS, "validation_failed"] == 1
    assert values[names.ERRORS, "not_found"] == 1
    assert values[names.ERRORS, "weight_commit_failed"] == 0  # there from the first scrape


async def test_a_push_is_counted_by_phase_bytes_and_outcome_and_a_repeated_one_only_as_such() -> (
    None
):
    service = fake_service(coordinator=_Coordinator())
    async with running(service) as client:
        assert (await client.post("/v1/weights", json=PUSH)).status_code == 200
        assert (await client.post("/v1/weights", json=PUSH)).status_code == 200
        refused = {**PUSH, "version": 13, "base_version": 1}
        assert (await client.post("/v1/weights", json=refused)).status_code == 500
        values = values_of((await client.get("/metrics")).text)
    outcomes = [values[names.PUSHES, outcome] for outcome in ("committed", "replayed", "refused")]
    assert outcomes == [1, 1, 1]
    assert values[names.PUSH_REFUSALS, "weight_commit_failed"] == 1
    assert values[f"{names.PUSH_PHASE_DURATION}_sum", "loading"] == 0.5
    assert values[f"{names.PUSH_PHASE_DURATION}_count", "recording"] == 0
    assert values[f"{names.PUSH_PAUSE}_sum",] == 0.5
    assert values[f"{names.PUSH_DURATION}_count",] == 1
    assert values[names.PUSH_BYTES, "full"] == 4000
    assert values[names.PUSH_ENGINES_REMOVED,] == 1
    assert values[names.LAST_COMMIT,] > 1.7e9
    assert values[names.PUSHES_IN_PROGRESS,] == 0


async def test_a_push_whose_caller_hung_up_is_counted_when_it_ends() -> None:
    coordinator = _Coordinator()
    coordinator.unblocked.clear()
    service = fake_service(coordinator=coordinator)
    async with running(service) as client:
        caller = asyncio.create_task(service.publish(PublishRequest.model_validate(PUSH)))
        await until(lambda: service._pushes._tasks, "the push to begin")
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        during = values_of((await client.get("/metrics")).text)
        coordinator.unblocked.set()
        await until(lambda: not service._pushes._tasks, "the push to end")
        after = values_of((await client.get("/metrics")).text)
    assert (during[names.PUSHES_IN_PROGRESS,], during[names.PUSHES, "committed"]) == (1, 0)
    assert (after[names.PUSHES_IN_PROGRESS,], after[names.PUSHES, "committed"]) == (0, 1)


async def test_audits_are_counted_by_what_they_found() -> None:
    async with running(fake_service(coordinator=_Coordinator())) as client:
        await client.post("/v1/weights/audit", json={})
        values = values_of((await client.get("/metrics")).text)
    assert values[names.AUDITS, "mismatch"] == 1
    assert values[names.AUDIT_MISMATCHES,] == 1
    assert values[f"{names.AUDIT_DURATION}_sum",] == 2.0


async def test_no_client_can_grow_the_number_of_series() -> None:
    async with running(fake_service()) as client:

        async def misbehave(word: str) -> set[tuple[str, ...]]:
            headers = {"x-request-id": word, "user-agent": word}
            await client.get(f"/{word}", headers=headers)
            await client.request(word.upper(), "/livez", headers=headers)
            await client.get(f"/v1/rollouts/{word}", headers=headers)
            await client.post("/v1/rollouts", json={**ROLLOUT, "request_id": word})
            await client.post("/v1/rollouts", json={**ROLLOUT, "reward": {"name": word}})
            await client.post("/v1/completions", json={**COMPLETION, "model": word})
            return set(values_of((await client.get("/metrics")).text))

        await misbehave("first")
        second = await misbehave("second")
        assert await misbehave("third") == second
    assert not {key for key in second if "second" in key}
