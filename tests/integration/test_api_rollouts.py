"""``/v1/rollouts`` over fake engines: results, streams, idempotency, aborts, failures."""

from __future__ import annotations

import asyncio
import json

import pytest

from rollout_server.scoring.types import RewardResult, ScoreJob
from shared.errors import EngineError
from shared.schemas.rollouts import (
    RolloutRequest,
    RolloutResponse,
    RolloutStatusResponse,
)
from shared.types import FinishReason, RewardStatus, RolloutRunState
from tests.fakes.engine import FakeEngine, fake_tokens
from tests.fakes.rollout_calls import body, lines, post
from tests.fakes.service import FakeCoordinator, FakeScorer, fake_service, running, until


async def test_a_request_comes_back_as_scored_groups_in_the_order_of_its_prompts() -> None:
    scorer = FakeScorer()
    async with running(fake_service(scorer=scorer)) as client:
        response = await post(client, body("r1", num_prompts=3))
    assert [group.group_id for group in response.groups] == [f"r1/group={i}" for i in range(3)]
    assert [group.metadata for group in response.groups] == [{"id": 0}, {"id": 1}, {"id": 2}]
    group = response.groups[1]
    assert group.prompt_token_ids == list(b"q1")
    sample = group.samples[1]
    assert sample.sample_index == 1
    assert sample.token_ids == fake_tokens(list(b"q1"), 1, 256)
    assert len(sample.logprobs) == len(sample.token_ids)
    assert sample.reward == len(sample.text)
    assert sample.reward_status is RewardStatus.OK
    assert sample.reward_detail == {"answer": "1"}
    assert response.usage.num_prompt_tokens == 6
    assert response.usage.num_completion_tokens == 36
    assert response.usage.num_accepted_tokens == 18
    assert {job.prompt for job in scorer.jobs} == {"q0", "q1", "q2"}


async def test_without_a_reward_nothing_is_scored() -> None:
    scorer = FakeScorer()
    async with running(fake_service(scorer=scorer)) as client:
        response = await post(client, body(reward=None))
    assert scorer.jobs == []
    assert response.groups[0].samples[0].reward_status is RewardStatus.SKIPPED
    assert response.request_id.startswith("rollout-")


async def test_metadata_of_any_json_comes_back_unchanged() -> None:
    metadata = {"big": 10**40, "text": 'é"\\\n', "nested": {"list": [None, True, 1.5]}}
    request = body(prompts=[{"prompt": "q", "metadata": metadata}])
    async with running(fake_service()) as client:
        answer = await client.post("/v1/rollouts", json=request)
    assert json.loads(answer.content)["groups"][0]["metadata"] == metadata


async def test_a_stream_gives_groups_as_they_finish_and_then_done() -> None:
    slow, fast = FakeEngine("slow"), FakeEngine("fast")
    slow.unblocked.clear()
    async with running(fake_service([slow, fast])) as client:
        task = asyncio.create_task(lines(client, body("r")))
        await until(lambda: len(fast.requests) == 1 and fast.num_running == 0, "the fast group")
        slow.unblocked.set()
        got = await task
    assert [line.type for line in got] == ["group", "group", "done"]
    assert [line.group.prompt_index for line in got if line.group] == [1, 0]
    assert got[-1].usage is not None
    assert got[-1].usage.num_completion_tokens == 24


async def test_a_failure_after_the_start_is_an_error_line_behind_the_finished_groups() -> None:
    good, bad = FakeEngine("good"), FakeEngine("bad", fail_with=EngineError("bad step"))
    bad.unblocked.clear()
    bad.fail_with = None
    async with running(fake_service([bad, good])) as client:
        task = asyncio.create_task(lines(client, body("r")))
        await until(lambda: len(good.requests) == 1 and good.num_running == 0, "the good group")
        bad.fail_with = EngineError("bad step")
        bad.unblocked.set()
        got = await task
        status = (await client.get("/v1/rollouts/r")).json()
    assert [line.type for line in got] == ["group", "error"]
    assert got[-1].error is not None
    assert got[-1].error.code == "engine_error"
    assert status["state"] == "failed"
    assert status["error"]["message"] == "bad step"


async def test_delete_ends_a_request_with_partial_samples() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service = fake_service([engine], max_num_seqs=1)  # room for one group of two; one waits
    async with running(service) as client:
        task = asyncio.create_task(post(client, body("r")))
        await until(lambda: engine.num_running == 2, "the first group to run")
        answer = await client.delete("/v1/rollouts/r")
        status = RolloutStatusResponse.model_validate_json(answer.content)
        response = await task
        assert (await client.delete("/v1/rollouts/r")).json() == answer.json()
    assert status.state is RolloutRunState.FINISHED
    assert status.result == response
    samples = [sample for group in response.groups for sample in group.samples]
    assert {sample.finish_reason for sample in samples} == {FinishReason.ABORT}
    assert {sample.reward_status for sample in samples} == {RewardStatus.SKIPPED}
    assert [len(sample.token_ids) for sample in samples] == [3, 3, 0, 0]
    assert service.router.accounts.num_cancelled == 4


async def test_samples_behind_the_committed_version_carry_their_lag() -> None:
    engine = FakeEngine("a", committed_version=3)
    service = fake_service([engine], coordinator=FakeCoordinator(committed_version=5))
    async with running(service) as client:
        stale = await post(client, body(max_policy_lag=1))
        fine = await post(client, body(max_policy_lag=2))
    assert [sample.policy_lag for sample in stale.groups[0].samples] == [2, 2]
    assert all(sample.stale for sample in stale.groups[0].samples)
    assert not any(sample.stale for sample in fine.groups[0].samples)


async def test_an_engine_that_dies_costs_no_sample() -> None:
    service = fake_service([FakeEngine("a", dies_on_generate=True), FakeEngine("b")])
    async with running(service) as client:
        response = await post(client, body(num_prompts=4))
    assert {s.engine_id for group in response.groups for s in group.samples} == {"b"}
    assert service.router.accounts.num_delivered == 8


async def test_a_broken_scoring_pool_costs_the_reward_and_not_the_sample() -> None:
    scorer = FakeScorer()
    scorer.broken = True
    async with running(fake_service(scorer=scorer)) as client:
        response = await post(client, body())
    sample = response.groups[0].samples[0]
    assert sample.reward is None
    assert sample.reward_status is RewardStatus.ERROR
    assert sample.token_ids


class BreaksSoon(FakeScorer):
    """Judges one sample, and then the pool is broken."""

    async def score(self, job: ScoreJob) -> RewardResult:
        result = await super().score(job)
        self.broken = True
        return result


async def test_a_scoring_pool_that_breaks_inside_a_group_costs_only_the_rewards_after_it() -> None:
    async with running(fake_service(scorer=BreaksSoon())) as client:
        response = await post(client, body(num_prompts=1))
    samples = response.groups[0].samples
    assert [sample.reward_status for sample in samples] == [RewardStatus.OK, RewardStatus.ERROR]
    assert samples[1].reward_detail == {"error": "the pool is broken"}
    assert all(sample.token_ids for sample in samples)


async def test_too_many_pending_samples_answer_429_and_free_up_again() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service = fake_service([engine], server={"limits": {"max_pending_samples": 6}})
    async with running(service) as client:
        task = asyncio.create_task(post(client, body("r")))
        await until(lambda: engine.num_running == 4, "the first request to run")
        refused = await client.post("/v1/rollouts", json=body("s"))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        engine.unblocked.set()
        await task
        await post(client, body("s"))


async def test_every_sample_is_accounted_for_exactly_once() -> None:
    engine = FakeEngine("a")
    service = fake_service([engine])
    async with running(service) as client:
        await post(client, body(num_prompts=3))
        engine.fail_with = EngineError("bad step")
        await client.post("/v1/rollouts", json=body(num_prompts=2))
        accounts = service.router.accounts
        accounts.check()
    assert accounts.num_accepted == 10
    assert accounts.num_delivered == 6
    assert accounts.num_failed + accounts.num_cancelled == 4
    assert accounts.num_failed >= 2


async def test_one_failed_group_ends_the_others_and_all_are_accounted_for() -> None:
    stuck, bad = FakeEngine("stuck"), FakeEngine("bad")
    stuck.unblocked.clear()
    bad.unblocked.clear()
    service = fake_service([stuck, bad])
    async with running(service) as client:
        task = asyncio.create_task(client.post("/v1/rollouts", json=body("r")))
        await until(lambda: stuck.num_running == bad.num_running == 2, "both groups to run")
        bad.fail_with = EngineError("bad step")
        bad.unblocked.set()
        answer = await task
        accounts = service.router.accounts
        assert (accounts.num_failed, accounts.num_cancelled, accounts.num_pending) == (2, 2, 0)
    assert answer.status_code == 500
    assert len(stuck.aborted) == 1


async def test_a_slow_reader_misses_no_group_that_finishes_meanwhile() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    service = fake_service([engine], max_num_seqs=1)
    async with running(service):
        request = RolloutRequest.model_validate(body("r", num_prompts=3))
        execution = await service.rollouts.submit(request)
        groups = execution.groups()
        await until(lambda: engine.num_running == 2, "the first group to run")
        engine.unblocked.set()
        first = await anext(groups)
        await execution.wait(timeout_s=10)  # the others finish while the reader holds the first
        rest = [group async for group in groups]
    indexes = [json.loads(group)["prompt_index"] for group in [first, *rest]]
    assert indexes == [0, 1, 2]


async def test_closing_the_service_ends_running_requests() -> None:
    engine = FakeEngine("a")
    engine.unblocked.clear()
    scorer = FakeScorer()
    service = fake_service([engine], scorer=scorer)
    async with running(service) as client:
        task = asyncio.create_task(client.post("/v1/rollouts", json=body("r")))
        await until(lambda: engine.num_running == 4, "the request to run")
        await service.close()
        response = RolloutResponse.model_validate_json((await task).content)
        refused = await client.post("/v1/rollouts", json=body("s"))
    assert response.groups[0].samples[0].finish_reason is FinishReason.ABORT
    assert refused.status_code == 503
    assert not scorer.is_running


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_an_unknown_request_id_is_not_found(method: str) -> None:
    async with running(fake_service()) as client:
        answer = await client.request(method, "/v1/rollouts/never/seen")
    assert answer.status_code == 404
    assert "never/seen" in answer.json()["error"]["message"]
