"""The result store, policy lag and usage: the pure parts of rollout requests."""

from __future__ import annotations

import asyncio
import weakref
from typing import cast

import pytest

from rollout_server.engine.protocol import ModelInfo
from rollout_server.rollouts.execution import RolloutExecution
from rollout_server.rollouts.groups import policy_lag
from rollout_server.rollouts.prompts import check_prompt_tokens, prepare_prompts
from rollout_server.rollouts.result_store import ENTRY_OVERHEAD_BYTES, ResultStore
from shared.errors import InvalidRequestError
from shared.schemas.rollouts import PromptItem, RolloutRequest, WeightVersionSpan
from tests.fakes.engine import FakeEngine
from tests.fakes.service import FakeTokenizer, fake_service, running, until

MODEL = ModelInfo(model_id="m", vocab_size=256, max_model_len=20)


class _Ended:
    """The two facts of an execution the store looks at."""

    def __init__(self, request_id: str, num_bytes: int) -> None:
        self.request_id = request_id
        self.num_bytes = num_bytes


def ended(request_id: str, num_bytes: int = 0) -> RolloutExecution:
    return cast(RolloutExecution, _Ended(request_id, num_bytes))


def test_a_result_is_kept_for_its_time_and_no_longer() -> None:
    now_s = 100.0
    store = ResultStore(ttl_s=10.0, max_bytes=10**6, clock=lambda: now_s)
    store.put(ended("a"))
    now_s = 109.9
    assert store.get("a") is not None
    now_s = 110.0
    assert store.get("a") is None
    assert store.num_bytes == 0


def test_the_oldest_results_go_first_when_bytes_run_out() -> None:
    store = ResultStore(ttl_s=10.0, max_bytes=3 * (100 + ENTRY_OVERHEAD_BYTES), clock=lambda: 0.0)
    for name in "abcd":
        store.put(ended(name, 100))
    assert [store.get(name) is not None for name in "abcd"] == [False, True, True, True]
    store.put(ended("huge", 10**9))
    assert store.get("huge") is None
    assert len(store) == 3


def test_a_result_put_again_replaces_the_old_one_and_its_bytes() -> None:
    store = ResultStore(ttl_s=10.0, max_bytes=10**6, clock=lambda: 0.0)
    store.put(ended("a", 500))
    store.put(ended("a", 100))
    assert store.num_bytes == 100 + ENTRY_OVERHEAD_BYTES


async def test_a_kept_result_does_not_keep_its_prompts() -> None:
    service = fake_service([FakeEngine("a")])
    async with running(service):
        request = RolloutRequest(request_id="r", prompts=[PromptItem(prompt="hi")])
        item = weakref.ref(request.prompts[0])
        execution = await service.rollouts.submit(request)
        del request
        await execution.wait()
        await until(lambda: item() is None, "the prompt to be forgotten")
        assert execution.num_finished_groups == 1
        assert execution.outlives_clients


def test_policy_lag_counts_from_the_oldest_token() -> None:
    spans = [
        WeightVersionSpan(version=5, start=0, end=3),
        WeightVersionSpan(version=6, start=3, end=4),
    ]
    assert policy_lag(spans, 7) == 2
    assert policy_lag([], 7) == 0


def test_a_prompt_with_no_room_for_its_completion_is_refused_with_all_three_numbers() -> None:
    check_prompt_tokens([1] * 15, MODEL, 5, "prompt")
    with pytest.raises(InvalidRequestError, match=r"16 tokens.*max_tokens is 5.*20"):
        check_prompt_tokens([1] * 16, MODEL, 5, "prompt")


def test_a_token_outside_the_vocabulary_is_named_with_its_place() -> None:
    with pytest.raises(InvalidRequestError, match=r"\[1\] is 256.*256 tokens") as caught:
        check_prompt_tokens([255, 256], MODEL, 1, "prompts.3.prompt_token_ids")
    assert caught.value.param == "prompts.3.prompt_token_ids.1"


async def test_prompts_of_every_form_are_prepared_alike() -> None:
    items = [
        PromptItem(prompt="hi"),
        PromptItem(prompt_token_ids=[104, 105]),
        PromptItem.model_validate({"messages": [{"role": "user", "content": "x"}]}),
    ]
    prepared = await asyncio.to_thread(prepare_prompts, items, FakeTokenizer(), MODEL, 1)
    assert [prompt.text for prompt in prepared] == ["hi", "hi", "user:x;"]
    assert prepared[0].token_ids == prepared[1].token_ids == [104, 105]
