"""Steps without drafts run without a speculative configuration; all others keep it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.engine.vllm_plugin.plain_steps import run_idle_steps_plainly

CONFIGURED = object()


def step(drafts: dict[str, list[int]], num_to_draft: int) -> SimpleNamespace:
    """What the two methods read of a ``SchedulerOutput``."""
    return SimpleNamespace(
        scheduled_spec_decode_tokens=drafts, num_spec_tokens_to_schedule=num_to_draft
    )


def runner(*, is_async: bool = False, state: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        use_async_scheduling=is_async, execute_model_state=state, speculative_config=CONFIGURED
    )


@run_idle_steps_plainly
def seen_config(self: Any, *_: Any) -> Any:
    return self.speculative_config


@pytest.mark.parametrize(
    ("drafts", "num_to_draft", "is_async", "expected"),
    [
        ({}, 0, False, None),
        ({"r": [5]}, 0, False, CONFIGURED),
        ({}, 2, False, CONFIGURED),
        ({}, 0, True, CONFIGURED),
    ],
    ids=["idle", "verifies", "drafts", "scheduled ahead"],
)
def test_only_an_idle_step_scheduled_in_time_runs_plainly(
    drafts: dict[str, list[int]], num_to_draft: int, is_async: bool, expected: object
) -> None:
    engine = runner(is_async=is_async)
    scheduled = step(drafts, num_to_draft)
    assert seen_config(engine, scheduled) is expected, "in execute_model"
    engine.execute_model_state = (scheduled, "logits")
    assert seen_config(engine, "grammar output") is expected, "in sample_tokens"
    assert engine.speculative_config is CONFIGURED


def test_the_configuration_comes_back_after_an_error() -> None:
    @run_idle_steps_plainly
    def failing(self: Any, *_: Any) -> None:
        raise ValueError("out of memory")

    engine = runner()
    with pytest.raises(ValueError, match="out of memory"):
        failing(engine, step({}, 0))
    assert engine.speculative_config is CONFIGURED


def test_a_call_without_a_step_is_passed_on() -> None:
    assert seen_config(runner(), None) is CONFIGURED
