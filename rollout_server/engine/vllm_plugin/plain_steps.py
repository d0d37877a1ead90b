"""Steps that draft nothing and verify nothing run as if speculation were not configured.

vLLM asks ``speculative_config is not None`` wherever a step does something for speculation:
bookkeeping of draft rows, the rejection sampler, the drafter's inputs, the deferred end of KV
transfers. A step that has neither drafts to verify nor drafts to make is given None for an answer,
and so runs the very code that an engine without speculation runs.

Only where vLLM schedules synchronously (CPU): a step that is scheduled ahead hands the next one its
sampled tokens through the drafter's inputs.

Leans on (vLLM 0.32.0): ``GPUModelRunner.execute_model`` and ``sample_tokens``,
``execute_model_state`` (its first item is the step's ``SchedulerOutput``), ``speculative_config``,
``use_async_scheduling``; ``SchedulerOutput.num_spec_tokens_to_schedule`` and
``scheduled_spec_decode_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def run_idle_steps_plainly(method: Any) -> Any:
    """Wrap ``execute_model`` or ``sample_tokens`` of vLLM's model runner."""

    def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        state = runner.execute_model_state
        # Between the two calls of a step its scheduler output is in the state.
        scheduler_output = state[0] if state is not None else args[0] if args else None
        if scheduler_output is None or not is_idle(runner, scheduler_output):
            return method(runner, *args, **kwargs)
        with _without_speculation(runner):
            return method(runner, *args, **kwargs)

    return wrapped


def is_idle(runner: Any, scheduler_output: Any) -> bool:
    """Whether the step neither verifies nor makes drafts."""
    return (
        not runner.use_async_scheduling
        and not getattr(scheduler_output, "scheduled_spec_decode_tokens", True)
        and scheduler_output.num_spec_tokens_to_schedule == 0
    )


@contextmanager
def _without_speculation(runner: Any) -> Iterator[None]:
    config, runner.speculative_config = runner.speculative_config, None
    try:
        yield
    finally:
        runner.speculative_config = config
