"""Generated sums with worked answers, e.g. ``12+7-5=`` -> ``12+7=19;19-5=14;ans=14``.

Used by the demo: the trainer draws prompts here and the demo model is warm-started on the worked
answers. Long sums are rarer than short ones and need longer answers, so completions have the long
tail that rollouts of real policies have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared.config.trainer import ArithmeticTaskConfig
from shared.errors import ConfigurationError
from trainer.tasks.problem import Problem, is_held_out

TERM_DECAY = 0.75
"""Each additional term makes a sum this much rarer."""
_MAX_FRUITLESS_DRAWS = 20_000
"""Draws in a row without a new problem after which there are taken to be no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticProblem:
    """``operands[0] signs[0] operands[1] ...``; no running total is negative."""

    operands: tuple[int, ...]  # [num_terms]
    signs: tuple[str, ...]  # [num_terms - 1]

    @property
    def prompt(self) -> str:
        """The canonical text, which also decides the side of the split."""
        tail = "".join(
            f"{sign}{operand}" for sign, operand in zip(self.signs, self.operands[1:], strict=True)
        )
        return f"{self.operands[0]}{tail}="

    @property
    def answer(self) -> str:
        """The total."""
        return str(self._running_totals()[-1])

    @property
    def worked_answer(self) -> str:
        """One step per sign, then the answer: ``12+7=19;19-5=14;ans=14``."""
        totals = self._running_totals()
        steps = [
            f"{totals[index]}{sign}{self.operands[index + 1]}={totals[index + 1]};"
            for index, sign in enumerate(self.signs)
        ]
        return "".join(steps) + self.direct_answer

    @property
    def direct_answer(self) -> str:
        """The answer without any work: ``ans=14``."""
        return f"ans={self.answer}"

    def _running_totals(self) -> list[int]:
        totals = [self.operands[0]]
        for sign, operand in zip(self.signs, self.operands[1:], strict=True):
            totals.append(totals[-1] + operand if sign == "+" else totals[-1] - operand)
        return totals


class ArithmeticTask:
    """Draws sums from seeds; see ``Task`` for the promises."""

    def __init__(self, config: ArithmeticTaskConfig) -> None:
        fewest, most = config.num_terms
        if not 2 <= fewest <= most:
            raise ConfigurationError(
                f"trainer.task.num_terms {list(config.num_terms)} must be two ascending numbers "
                "of at least 2",
                param="trainer.task.num_terms",
            )
        self._config = config
        self._term_counts = range(fewest, most + 1)
        self._term_weights = [TERM_DECAY ** (count - fewest) for count in self._term_counts]

    def train_batch(self, step: int, count: int) -> Sequence[Problem]:
        """``count`` distinct training problems for ``step``.

        Raises:
            ConfigurationError: the configuration allows fewer distinct problems than that.
        """
        rng = random.Random(f"{self._config.seed}/train/{step}")
        found = self._distinct(rng, count, held_out=False)
        if len(found) < count:
            raise ConfigurationError(
                f"trainer.task has only about {len(found)} distinct problems, not the {count} of "
                "trainer.prompts_per_step; raise trainer.task.max_operand or num_terms",
                param="trainer.task.max_operand",
            )
        return found

    def held_out(self, count: int) -> Sequence[Problem]:
        """``count`` distinct problems that are never trained on; fewer if there are fewer.

        Raises:
            ConfigurationError: there is none.
        """
        found = self._distinct(random.Random(f"{self._config.seed}/held_out"), count, held_out=True)
        if not found:
            raise ConfigurationError(
                f"trainer.task.held_out_fraction {self._config.held_out_fraction} holds out none "
                "of the problems; raise it, or trainer.task.max_operand",
                param="trainer.task.held_out_fraction",
            )
        return found

    def training_stream(self, seed: int) -> Iterator[ArithmeticProblem]:
        """Training-side sums without end, repeats allowed (for the warm start)."""
        rng = random.Random(f"{self._config.seed}/stream/{seed}")
        while True:
            item = self._draw(rng)
            if not is_held_out(item.prompt, self._config.held_out_fraction):
                yield item

    def _distinct(self, rng: random.Random, count: int, *, held_out: bool) -> list[Problem]:
        """Up to ``count`` different problems of one side; fewer when they run out."""
        found: dict[str, Problem] = {}
        num_fruitless = 0
        while len(found) < count and num_fruitless < _MAX_FRUITLESS_DRAWS:
            item = self._draw(rng)
            is_wanted = is_held_out(item.prompt, self._config.held_out_fraction) is held_out
            if is_wanted and item.prompt not in found:
                found[item.prompt] = _to_problem(item)
                num_fruitless = 0
            else:
                num_fruitless += 1
        return list(found.values())

    def _draw(self, rng: random.Random) -> ArithmeticProblem:
        (num_terms,) = rng.choices(self._term_counts, self._term_weights)
        operands = [rng.randint(1, self._config.max_operand)]
        signs: list[str] = []
        total = operands[0]
        for _ in range(num_terms - 1):
            operand = rng.randint(1, self._config.max_operand)
            # Subtract only what is there, so that no total needs a minus sign of its own.
            sign = rng.choice("+-") if operand <= total else "+"
            total += operand if sign == "+" else -operand
            operands.append(operand)
            signs.append(sign)
        return ArithmeticProblem(operands=tuple(operands), signs=tuple(signs))


def _to_problem(item: ArithmeticProblem) -> Problem:
    return Problem(
        prompt=item.prompt, answer=item.answer, metadata={"num_terms": len(item.operands)}
    )
