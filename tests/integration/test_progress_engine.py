"""What a real engine tells of running requests, and that another request can go on from it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GenerateRequest, GenerateResult
from rollout_server.router.group_work import GroupWork
from shared.schemas.rollouts import SamplingOptions
from tests.support.engine import greedy, speculate
from tests.support.models import greedy_reference, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


async def progressed(
    engine: EngineActor, running: asyncio.Task[GenerateResult], work: GroupWork, num_tokens: int
) -> None:
    """Ask as the router does, until the work knows so many tokens of every sample."""
    (piece,) = work.pieces()
    while not running.done():
        known = work.known(piece)
        if len(known.num_tokens) == len(piece.sample_indices) and all(
            count >= num_tokens for count in known.num_tokens.values()
        ):
            return
        news = await engine.progress({piece.request.request_id: known})
        work.note(piece, news.get(piece.request.request_id, []))
        await asyncio.sleep(0.005)


def group(name: str, prompt: list[int], n: int, sampling: SamplingOptions) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, n=n, sampling=sampling)


async def interrupted(
    engine: EngineActor, request: GenerateRequest
) -> tuple[GroupWork, GenerateResult]:
    """Some tokens known, then ended; what the engine itself had at the end."""
    work = GroupWork(request, lambda prompt, ids: "", may_continue=True)
    running = asyncio.create_task(engine.generate(request))
    await progressed(engine, running, work, 20)
    await progressed(engine, running, work, 40)  # in more than one answer
    assert not running.done(), "it was too short to be interrupted"
    await engine.abort(request.request_id)
    return work, await running


async def test_news_are_what_the_engine_returns_in_the_end(engine: EngineActor) -> None:
    await speculate(engine, 3)
    prompt = random_prompts(1, seed=31)[0]
    sampling = SamplingOptions(max_tokens=400, ignore_eos=True)
    work, result = await interrupted(engine, group("news", prompt, 3, sampling))
    work.end_as_aborted()
    for known, true in zip(work.samples(), result.samples, strict=True):
        length = len(known.token_ids)
        assert 40 <= length <= len(true.token_ids) < 400
        assert known.token_ids == true.token_ids[:length]
        assert known.logprobs == true.logprobs[:length]
        assert known.weight_versions[-1].end == length


async def test_going_on_behind_what_is_known_makes_the_same_tokens(
    engine: EngineActor, tiny_model: Path
) -> None:
    await speculate(engine, 3)
    prompt = random_prompts(1, seed=32)[0]
    work, _ = await interrupted(engine, group("cut", prompt, 1, greedy(300)))
    work.engine_died()
    assert work.num_kept_tokens >= 40
    for piece in work.pieces():
        work.take(piece, await engine.generate(piece.request))
    (expected,) = greedy_reference(tiny_model, [prompt], 300)
    for sample in work.samples():
        assert sample.token_ids == expected
        assert len(sample.logprobs) == 300
        (span,) = sample.weight_versions
        assert (span.start, span.end) == (0, 300)


async def test_samples_that_are_told_to_stop_go_on_elsewhere_with_all_they_had(
    engine: EngineActor, tiny_model: Path
) -> None:
    await speculate(engine, 3)
    prompt = random_prompts(1, seed=33)[0]
    request = group("late", prompt, 1, greedy(300))
    work = GroupWork(request, lambda prompt, ids: "", may_continue=True)
    (piece,) = work.pieces()
    running = asyncio.create_task(engine.generate(request))
    await progressed(engine, running, work, 20)
    assert not running.done(), "it was too short to be stopped"
    work.begin_handover()
    await engine.abort(request.request_id)
    stopped = await running
    work.take(piece, stopped)
    work.engine_left()
    rests = work.pieces()
    had = [sample.token_ids for sample in stopped.samples]
    assert [rest.request.prompt_token_ids for rest in rests] == [[*prompt, *ids] for ids in had]
    for rest in rests:
        work.take(rest, await engine.generate(rest.request))
    (expected,) = greedy_reference(tiny_model, [prompt], 300)
    for sample in work.samples():
        assert sample.token_ids == expected
        assert len(sample.logprobs) == 300
        (span,) = sample.weight_versions
        assert (span.start, span.end) == (0, 300)


async def test_requests_that_are_over_or_unknown_have_no_news(engine: EngineActor) -> None:
    request = group("over", [1, 2, 3], 1, greedy(4))
    await engine.generate(request)
    work = GroupWork(request, lambda prompt, ids: "", may_continue=True)
    known = work.known(work.pieces()[0])
    assert await engine.progress({"over": known, "never": known}) == {}
