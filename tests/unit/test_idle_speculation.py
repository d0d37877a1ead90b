"""What steps without drafts skip, and that steps with drafts skip nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.engine.vllm_plugin import idle_speculation


class Recorded:
    """Stands for the wrapped vLLM method; remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> str:
        self.calls.append(arguments)
        return "original"


@pytest.mark.parametrize(("length", "asked"), [(0, 0), (1, 1), (3, 1)])
def test_workers_are_asked_for_drafts_only_after_steps_that_drafted(
    length: int, asked: int
) -> None:
    original = Recorded()
    core = SimpleNamespace(scheduler=SimpleNamespace(last_draft_length=length))
    idle_speculation.skip_empty_draft_exchange(original)(core, model_executed=True)
    assert len(original.calls) == asked


def test_an_engine_of_somebody_elses_is_left_as_it_is() -> None:
    original = Recorded()
    core = SimpleNamespace(scheduler=SimpleNamespace())
    idle_speculation.skip_empty_draft_exchange(original)(core, True)
    assert len(original.calls) == 1


@pytest.mark.parametrize("longest_draft", [0, 1, 4])
def test_only_steps_without_drafts_are_sampled_plainly(longest_draft: int) -> None:
    original = Recorded()
    metadata = SimpleNamespace(max_spec_len=longest_draft)
    sample = idle_speculation.sample_plainly_without_drafts(original)
    assert sample("runner", "logits", metadata) == "original"
    assert original.calls == [("runner", "logits", metadata if longest_draft else None)]


@pytest.mark.parametrize(
    ("length", "is_async", "proposes"), [(0, False, False), (0, True, True), (2, False, True)]
)
def test_only_a_draft_length_of_zero_skips_the_proposal(
    length: int, is_async: bool, proposes: bool
) -> None:
    original = Recorded()
    runner = SimpleNamespace(
        valid_sampled_token_count_event=object() if is_async else None,
        input_batch=SimpleNamespace(num_reqs=5),
    )
    propose = idle_speculation.propose_nothing_without_preparation(original)
    result = propose(runner, SimpleNamespace(num_spec_tokens_to_schedule=length), "sampled")
    if proposes:
        assert result == "original"
    else:
        assert result.shape == (5, 0)
        assert original.calls == []
