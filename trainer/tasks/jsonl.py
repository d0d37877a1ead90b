"""Problems from the user's JSONL files: one object per line with a prompt and an answer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.config.trainer import JsonlTaskConfig
from shared.errors import ConfigurationError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import ChatMessage
from trainer.tasks.problem import Problem, is_held_out

_JSON_OBJECT: TypeAdapter[JsonObject] = TypeAdapter(JsonObject)


class JsonlTask:
    """Reads the files once. Training goes through a fresh permutation per pass over the data."""

    def __init__(self, config: JsonlTaskConfig) -> None:
        """Read the files.

        Raises:
            ConfigurationError: a file cannot be read, a line is not usable, or a side is empty.
        """
        problems = _read_problems(Path(config.train_path), config)
        if config.held_out_path is not None:
            self._held_out = _read_problems(Path(config.held_out_path), config)
            taken = {problem.prompt_text for problem in self._held_out}
            self._train = [item for item in problems if item.prompt_text not in taken]
        else:
            fraction = config.held_out_fraction
            self._held_out = [p for p in problems if is_held_out(p.prompt_text, fraction)]
            self._train = [p for p in problems if not is_held_out(p.prompt_text, fraction)]
        if not self._train or not self._held_out:
            raise ConfigurationError(
                f"{config.train_path} leaves {len(self._train)} training and "
                f"{len(self._held_out)} held-out problems; both sides need at least one "
                "(trainer.task.held_out_fraction, trainer.task.held_out_path)",
                param="trainer.task.train_path",
            )
        self._seed = config.seed
        self._current_order: tuple[int, list[int]] = (-1, [])  # (pass index, permutation)

    def train_batch(self, step: int, count: int) -> Sequence[Problem]:
        """The next ``count`` problems of the endless shuffled pass, as of ``step``.

        With 10 problems and ``count`` 4, step 2 takes the last two of pass 0 and two of pass 1.
        """
        size = len(self._train)
        return [
            self._train[self._order(position // size)[position % size]]
            for position in range(step * count, (step + 1) * count)
        ]

    def held_out(self, count: int) -> Sequence[Problem]:
        """The first ``count`` held-out problems of a fixed shuffle; fewer if there are fewer."""
        order = list(range(len(self._held_out)))
        random.Random(f"{self._seed}/held_out").shuffle(order)
        return [self._held_out[index] for index in order[:count]]

    def _order(self, pass_index: int) -> list[int]:
        if self._current_order[0] != pass_index:
            order = list(range(len(self._train)))
            random.Random(f"{self._seed}/train/{pass_index}").shuffle(order)
            self._current_order = (pass_index, order)
        return self._current_order[1]


def _read_problems(path: Path, config: JsonlTaskConfig) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise ConfigurationError(
            f"cannot read task file {path}: {exc.strerror}", param="trainer.task.train_path"
        ) from exc
    return [
        _to_problem(line, f"{path}:{number}", config)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _to_problem(line: str, where: str, config: JsonlTaskConfig) -> Problem:
    try:
        record = _JSON_OBJECT.validate_python(json.loads(line))
        answer = record.get(config.answer_field)
        if not isinstance(answer, str | int | float):
            raise ValueError(f"field {config.answer_field!r} (trainer.task.answer_field) is absent")
        metadata = record.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise ValueError("field 'metadata' is not an object")
        prompt = record.get(config.prompt_field)
        if isinstance(prompt, str) and prompt:
            return Problem(prompt=prompt, answer=str(answer), metadata=metadata)
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"neither field {config.prompt_field!r} (trainer.task.prompt_field) nor "
                "'messages' is given"
            )
        turns = tuple(ChatMessage.model_validate(message) for message in messages)
    except (ValueError, ValidationError) as exc:
        raise ConfigurationError(f"{where}: {exc}", param="trainer.task.train_path") from exc
    return Problem(messages=turns, answer=str(answer), metadata=metadata)
