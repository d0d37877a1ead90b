"""The engine of the server's benchmarks: its pace, its aborts, its places."""

from __future__ import annotations

import asyncio

from benchmarks.harness.modelled_engine import EngineTimes, ModelledEngine, completion_length
from rollout_server.engine.protocol import GenerateRequest
from shared.schemas.rollouts import SamplingOptions
from shared.types import FinishReason
from tests.fakes.service import until

PACED = EngineTimes(step_s=0.001, max_num_seqs=3)


def request(name: str, n: int = 2, max_tokens: int = 5, prompt: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=[prompt],
        n=n,
        sampling=SamplingOptions(max_tokens=max_tokens),
    )


async def test_an_instant_engine_gives_every_sample_its_tokens_at_once() -> None:
    result = await ModelledEngine("a", EngineTimes()).generate(request("r", n=3))
    assert [len(sample.token_ids) for sample in result.samples] == [5, 5, 5]
    assert all(len(sample.logprobs) == 5 for sample in result.samples)
    assert {sample.finish_reason for sample in result.samples} == {FinishReason.LENGTH}


async def test_no_more_sequences_run_than_there_are_places() -> None:
    engine = ModelledEngine("a", PACED)
    work = asyncio.gather(*(engine.generate(request(f"r{i}", n=2)) for i in range(3)))
    seen = []
    while not work.done():
        status = await engine.status()
        seen.append(status.num_running_reqs)
        await asyncio.sleep(0.0005)
    assert max(seen) == 3
    assert [len(s.token_ids) for result in await work for s in result.samples] == [5] * 6


async def test_an_abort_ends_a_request_with_what_there_is_and_frees_its_places() -> None:
    engine = ModelledEngine("a", PACED)
    work = asyncio.create_task(engine.generate(request("r", n=4, max_tokens=100_000)))
    await until(lambda: engine._running and engine._running[0].num_tokens > 2, "a few steps")
    await engine.abort("r")
    result = await work
    assert {sample.finish_reason for sample in result.samples} == {FinishReason.ABORT}
    assert 2 < len(result.samples[0].token_ids) < 100_000
    assert result.samples[3].token_ids == []  # it waited for a place
    status = await engine.status()
    assert (status.num_running_reqs, status.num_waiting_reqs) == (0, 0)


async def test_a_cancelled_request_frees_its_places_too() -> None:
    engine = ModelledEngine("a", PACED)
    work = asyncio.create_task(engine.generate(request("r", max_tokens=100_000)))
    await until(lambda: engine._running, "the first step")
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert (await engine.status()).num_running_reqs == 0


def test_lengths_depend_on_prompt_and_sample_only_and_have_the_mean_asked_for() -> None:
    times = EngineTimes(mean_tokens=50.0)
    lengths = [
        completion_length(request("r", max_tokens=100_000, prompt=prompt), index, times)
        for prompt in range(100)
        for index in range(10)
    ]
    again = completion_length(request("other", max_tokens=100_000, prompt=7), 3, times)
    assert again == lengths[73]
    assert 42 < sum(lengths) / len(lengths) < 58
    assert len(set(lengths)) > 50
