"""The real ``openai`` client against ``/v1/completions`` and ``/v1/models``, over HTTP."""

from __future__ import annotations

import asyncio

import openai
import pytest

from shared.errors import EngineError
from tests.fakes.engine import FakeEngine, fake_tokens
from tests.fakes.http_server import serving
from tests.fakes.service import fake_service, until


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def text_of(prompt: str, sample_index: int = 0, max_tokens: int = 16) -> str:
    return bytes(fake_tokens(list(prompt.encode()), sample_index, max_tokens)).decode()


async def test_the_openai_client_lists_the_model() -> None:
    async with serving(fake_service()) as url, client_of(url) as client:
        models = (await client.models.list()).data
        assert [model.id for model in models] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


@pytest.mark.parametrize("model", ["tiny", "models/tiny"])
async def test_the_openai_client_completes_text(model: str) -> None:
    async with serving(fake_service()) as url, client_of(url) as client:
        answer = await client.completions.create(
            model=model, prompt="hi", n=2, max_tokens=4, logprobs=0, stop="zz"
        )
    assert answer.model == model
    assert [choice.text for choice in answer.choices] == [text_of("hi", i, 4) for i in (0, 1)]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 8)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list(text_of("hi", 0, 4))
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.text_offset == [0, 1, 2, 3]


async def test_several_prompts_number_their_choices_prompt_by_prompt() -> None:
    engine = FakeEngine("a")
    async with serving(fake_service([engine])) as url, client_of(url) as client:
        answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2)
        ids = await client.completions.create(
            model="tiny", prompt=[[97], [98]], extra_body={"return_token_ids": True}
        )
    expected = [text_of(prompt, i) for prompt in "ab" for i in (0, 1)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    extra = ids.choices[1].model_extra
    assert extra is not None
    assert extra["prompt_token_ids"] == [98]
    assert extra["token_ids"] == fake_tokens([98], 0, 16)


async def test_a_stream_adds_up_to_the_whole_and_ends_with_its_usage() -> None:
    service = fake_service()
    async with serving(service) as url, client_of(url) as client:
        stream = await client.completions.create(
            model="tiny",
            prompt=["a", "b"],
            n=2,
            stream=True,
            logprobs=0,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    texts = ["", "", "", ""]
    reasons: dict[int, str | None] = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset == [len(texts[choice.index])]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [text_of(prompt, i) for prompt in "ab" for i in (0, 1)]
    assert reasons == dict.fromkeys(range(4), "stop")
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert service.router.accounts.num_delivered == 4


async def test_an_unknown_model_raises_the_clients_not_found() -> None:
    async with serving(fake_service()) as url, client_of(url) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="gpt-9", prompt="hi")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_an_overload_raises_the_clients_rate_limit_error_even_for_a_stream() -> None:
    engine = FakeEngine("a")
    service = fake_service([engine], server={"limits": {"max_pending_samples": 1}})
    async with serving(service) as url, client_of(url) as client:
        service.router.accounts.accept(1)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="tiny", prompt="hi", stream=stream)
        service.router.accounts.settle(num_cancelled=1)


async def test_an_engine_that_fails_is_a_500_and_in_mid_stream_an_error_event() -> None:
    engine = FakeEngine("a", fail_with=EngineError("bad step"))
    service = fake_service([engine])
    async with serving(service) as url, client_of(url) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="bad step"):
                await client.completions.create(model="tiny", prompt="hi", stream=stream)
        engine.fail_with = None
        engine.dies_after_deltas = 2
        chunks = await client.completions.create(model="tiny", prompt="hi", stream=True)
        with pytest.raises(openai.APIError, match="engine a is dead"):
            [chunk async for chunk in chunks]
    assert service.router.accounts.num_failed == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failed_prompt_ends_the_others(stream: bool) -> None:
    stuck, bad = FakeEngine("stuck"), FakeEngine("bad")
    stuck.unblocked.clear()
    bad.unblocked.clear()
    service = fake_service([stuck, bad])
    async with serving(service) as url, client_of(url) as client:
        task = asyncio.create_task(
            client.completions.create(model="tiny", prompt=["a", "b"], stream=stream)
        )
        await until(lambda: stuck.num_running == bad.num_running == 1, "both prompts to run")
        bad.fail_with = EngineError("bad step")
        bad.unblocked.set()
        with pytest.raises(openai.InternalServerError, match="bad step"):
            await task
        await until(lambda: service.router.accounts.num_pending == 0, "the books to close")
    assert len(stuck.aborted) == 1
    assert service.router.num_reserved("stuck") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_work(stream: bool) -> None:
    engine = FakeEngine("a", delay_s=0.02 if stream else 0.0)
    if not stream:
        engine.unblocked.clear()
    service = fake_service([engine])
    async with serving(service) as url:
        async with client_of(url) as client:
            if stream:
                chunks = await client.completions.create(
                    model="tiny", prompt="hi", n=8, stream=True
                )
                await anext(aiter(chunks))
                await chunks.close()
            else:
                impatient = client.with_options(timeout=0.2)
                with pytest.raises(openai.APITimeoutError):
                    await impatient.completions.create(model="tiny", prompt="hi")
        await until(lambda: len(engine.aborted) == 1, "the engine to be told")
        await until(lambda: service.router.accounts.num_pending == 0, "the books to close")
        assert service.router.accounts.num_cancelled > 0
