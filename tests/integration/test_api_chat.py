"""The real ``openai`` client against ``/v1/chat/completions``, over HTTP."""

from __future__ import annotations

import openai
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout_server.tokenizer import HuggingFaceTokenizer
from shared.errors import EngineError
from tests.fakes.engine import FakeEngine, fake_tokens
from tests.fakes.http_server import serving
from tests.fakes.service import fake_service

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
]
RENDERED = list(b"system:be brief;user:hi;")


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def text_of(prompt: list[int], sample_index: int = 0, max_tokens: int = 16) -> str:
    return bytes(fake_tokens(prompt, sample_index, max_tokens)).decode()


async def test_a_conversation_is_answered_with_everything_that_was_asked_for() -> None:
    engine = FakeEngine("a")
    async with serving(fake_service([engine])) as url, client_of(url) as client:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            n=2,
            max_completion_tokens=4,
            logprobs=True,
            stop=["zz"],
            seed=7,
            temperature=0.5,
            logit_bias={"97": 1},
            extra_body={"return_token_ids": True, "top_k": 5},
        )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == [
        text_of(RENDERED, index, 4) for index in (0, 1)
    ]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(RENDERED), 8)
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list(text_of(RENDERED, 1, 4))
    assert [entry.bytes for entry in logprobs.content] == [
        list(entry.token.encode()) for entry in logprobs.content
    ]
    assert [entry.logprob for entry in logprobs.content] == [-0.5] * 4
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == RENDERED
    extra = answer.choices[1].model_extra
    assert extra is not None
    assert extra["token_ids"] == fake_tokens(RENDERED, 1, 4)
    assert extra["weight_versions"] == [{"version": 0, "start": 0, "end": 4}]
    sampling = engine.requests[0].sampling
    assert (sampling.seed, sampling.stop, sampling.temperature) == (7, ["zz"], 0.5)
    assert (sampling.top_k, sampling.logit_bias) == (5, {97: 1.0})


async def test_an_answer_can_be_sent_back_as_the_next_turn() -> None:
    async with serving(fake_service()) as url, client_of(url) as client:
        first = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            max_tokens=3,
        )
        said = first.choices[0].message
        second = await client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "user", "content": "a"},
                said,  # type: ignore[list-item]  # as openai's own examples do
                {"role": "user", "content": "b"},
            ],
            extra_body={"return_token_ids": True},
        )
    assert second.model_extra is not None
    rendered = bytes(second.model_extra["prompt_token_ids"]).decode()
    assert rendered == f"user:a;assistant:{said.content};user:b;"


async def test_a_chat_stream_adds_up_to_the_whole_and_says_the_role_once() -> None:
    async with serving(fake_service()) as url, client_of(url) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            n=2,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        chunks = [chunk async for chunk in stream]
    texts, roles, ids = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index].append(choice.delta.role)
        assert choice.model_extra is not None
        ids[choice.index] += choice.model_extra["token_ids"]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [entry.token for entry in choice.logprobs.content] == [choice.delta.content]
    assert texts == [text_of(RENDERED, index) for index in (0, 1)]
    assert ids == [fake_tokens(RENDERED, index, 16) for index in (0, 1)]
    assert roles == [["assistant"] + [None] * 5] * 2
    extras = [chunk.model_extra or {} for chunk in chunks]
    assert [extra["prompt_token_ids"] for extra in extras if extra["prompt_token_ids"]] == [
        RENDERED
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


async def test_the_openai_clients_own_accumulator_takes_the_stream() -> None:
    async with (
        serving(fake_service()) as url,
        client_of(url) as client,
        client.chat.completions.stream(
            model="tiny", messages=[{"role": "user", "content": "a"}]
        ) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == text_of(list(b"user:a;"))
    assert final.choices[0].finish_reason == "stop"


async def test_without_a_length_the_context_and_the_configured_limit_bound_the_answer() -> None:
    engine = FakeEngine("a")
    for limit, expected in ((131072, 1024 - 7), (100, 100)):
        service = fake_service([engine], server={"limits": {"max_tokens": limit}})
        async with serving(service) as url, client_of(url) as client:
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "a"}]
            )
        assert engine.requests[-1].sampling.max_tokens == expected


async def test_the_template_is_the_model_s_own() -> None:
    vocab = {"<unk>": 0, "<u>": 1, "<a>": 2, "hi": 3, "there": 4}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    huggingface = PreTrainedTokenizerFast(tokenizer_object=fast)
    huggingface.chat_template = (
        "{% for m in messages %}<u> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    service = fake_service(tokenizer=HuggingFaceTokenizer(huggingface))
    async with serving(service) as url, client_of(url) as client:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi there"}],
            extra_body={"return_token_ids": True},
        )
        assert answer.model_extra is not None
        assert answer.model_extra["prompt_token_ids"] == [1, 3, 4, 2]
        huggingface.chat_template = None
        with pytest.raises(openai.BadRequestError, match="this model's tokenizer has none"):
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi there"}]
            )


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "UnprocessableEntityError", "chat_template"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "UnprocessableEntityError",
            "tools",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}],
                    }
                ]
            },
            "UnprocessableEntityError",
            "messages.0.content",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "BadRequestError", "messages"),
        ({"messages": []}, "UnprocessableEntityError", "messages"),
        ({"top_logprobs": 3, "logprobs": True}, "UnprocessableEntityError", "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "BadRequestError", "max_tokens"),
        ({"max_tokens": 5000}, "BadRequestError", "max_tokens"),
        ({"max_completion_tokens": 5000}, "BadRequestError", "max_completion_tokens"),
        (
            {"messages": [{"role": "user", "content": "x" * 1100}]},
            "BadRequestError",
            "messages",
        ),
        ({"n": 1000}, "BadRequestError", "n"),
        ({"stop": [""]}, "BadRequestError", "stop"),
        ({"logit_bias": {"999": 1}}, "BadRequestError", "logit_bias.999"),
        ({"model": "gpt-9"}, "NotFoundError", "model"),
    ],
)
async def test_what_is_not_honoured_is_refused_by_name(
    changes: dict[str, object], error: str, param: str
) -> None:
    engine = FakeEngine("a")
    arguments: dict[str, object] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        **changes,
    }
    async with serving(fake_service([engine])) as url, client_of(url) as client:
        for stream in (False, True):
            with pytest.raises(getattr(openai, error)) as caught:
                await client.chat.completions.create(**arguments, stream=stream)  # type: ignore[call-overload]
            assert caught.value.param == param
    assert engine.requests == []


async def test_failures_raise_the_openai_clients_exceptions() -> None:
    engine = FakeEngine("a", fail_with=EngineError("bad step"))
    service = fake_service([engine], server={"limits": {"max_pending_samples": 1}})
    messages = [{"role": "user", "content": "a"}]
    async with serving(service) as url, client_of(url) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="bad step"):
                await client.chat.completions.create(  # type: ignore[call-overload]
                    model="tiny", messages=messages, stream=stream
                )
        engine.fail_with = None
        service.router.accounts.accept(1)
        with pytest.raises(openai.RateLimitError) as overload:
            await client.chat.completions.create(
                model="tiny",
                messages=messages,  # type: ignore[arg-type]
            )
        assert int(overload.value.response.headers["retry-after"]) >= 1
        service.router.accounts.settle(num_cancelled=1)
        engine.dies_after_deltas = 2
        chunks = await client.chat.completions.create(  # type: ignore[call-overload]
            model="tiny", messages=messages, stream=True
        )
        with pytest.raises(openai.APIError, match="engine a is dead"):
            [chunk async for chunk in chunks]
