"""What the policy is trained on: seeded problem sources with disjoint held-out sets."""

from __future__ import annotations

from shared.config.trainer import ArithmeticTaskConfig, TaskConfig
from trainer.tasks.arithmetic import ArithmeticTask
from trainer.tasks.jsonl import JsonlTask
from trainer.tasks.problem import Problem, Task

__all__ = ["ArithmeticTask", "JsonlTask", "Problem", "Task", "build_task"]


def build_task(config: TaskConfig) -> Task:
    """The task a configuration asks for.

    Raises:
        ConfigurationError: a JSONL file cannot be read or holds no usable problem.
    """
    if isinstance(config, ArithmeticTaskConfig):
        return ArithmeticTask(config)
    return JsonlTask(config)
