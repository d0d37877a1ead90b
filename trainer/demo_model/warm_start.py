"""Supervised warm start: a policy that can work sums out, but usually guesses.

GRPO needs groups with right and wrong answers, and something to find out. So the warm start has two
stages. First the model learns worked answers until it is right most of the time
(``TARGET_WORKED_ACCURACY``). Then most examples are direct answers (``ans=14`` and no work), until
sampled accuracy has come down to ``TARGET_SAMPLED_ACCURACY``: guesses are mostly wrong. What
reinforcement has to find is that working pays; completions grow as it does.

Hidden matrices are trained by Muon (https://arxiv.org/abs/2502.16982), which needs about half the
steps AdamW needs here.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from shared.config.trainer import ArithmeticTaskConfig
from trainer.demo_model.accuracy import Accuracy, measure_accuracy
from trainer.demo_model.examples import ExampleBatches
from trainer.tasks.arithmetic import ArithmeticTask

LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
MAX_GRAD_NORM = 1.0
TARGET_WORKED_ACCURACY = 0.6
"""Sampled accuracy that ends the first stage."""
TARGET_SAMPLED_ACCURACY = 0.36
"""Sampled accuracy that ends the second stage."""
GUESSING_FRACTION = 0.6
"""Of direct answers in the second stage."""
GUESSING_LEARNING_RATE = 4e-4
"""Low: much above, the second stage forgets how to work sums out."""
MAX_GUESSING_STEPS = 48
GUESSING_CHECK_EVERY_STEPS = 3
CHECK_EVERY_STEPS = 20
FIRST_CHECK_STEP = 120
NUM_CHECK_PROBLEMS = 96
MAX_WARM_START_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartProgress:
    """Reported after every step."""

    step: int
    num_steps: int
    loss: float
    accuracy: Accuracy | None
    """Measured at this step, if it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartResult:
    """How the warm start ended."""

    num_steps: int
    loss: float | None
    accuracy: Accuracy | None
    """The last one measured."""


def warm_start(
    model: Any,
    tokenizer: Any,
    task_config: ArithmeticTaskConfig,
    *,
    seed: int,
    num_steps: int,
    on_progress: Callable[[WarmStartProgress], None],
) -> WarmStartResult:
    """Train ``model`` in place, ``num_steps`` steps or about ``MAX_WARM_START_S`` at most.

    Too few steps for a measurement (``FIRST_CHECK_STEP``) all go to worked answers.
    """
    run = _WarmStart(model, tokenizer, ArithmeticTask(task_config), seed, num_steps, on_progress)
    if num_steps < FIRST_CHECK_STEP + MAX_GUESSING_STEPS:
        run.take_steps(num_steps, measure=False)
    else:
        worked_accuracy = run.learn_worked_answers(num_steps - MAX_GUESSING_STEPS)
        if worked_accuracy > TARGET_SAMPLED_ACCURACY:
            run.learn_to_guess()
    model.eval()
    return WarmStartResult(num_steps=run.step, loss=run.loss, accuracy=run.accuracy)


class _WarmStart:
    """The state of one warm start."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: ArithmeticTask,
        seed: int,
        num_steps: int,
        on_progress: Callable[[WarmStartProgress], None],
    ) -> None:
        self.step = 0
        self.loss: float | None = None
        self.accuracy: Accuracy | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._held_out = task.held_out(NUM_CHECK_PROBLEMS)
        self._examples = ExampleBatches(task, tokenizer, seed)
        self._optimizers = _optimizers(model)
        self._learning_rate = LEARNING_RATE
        self._seed = seed
        self._num_steps = num_steps
        self._on_progress = on_progress

    def learn_worked_answers(self, max_steps: int) -> float:
        """Stage one. Returns sampled accuracy at its end."""
        deadline_s = monotonic() + MAX_WARM_START_S
        next_check = FIRST_CHECK_STEP
        while True:
            accuracy = self.take_steps(min(next_check, max_steps) - self.step)
            next_check = self.step + CHECK_EVERY_STEPS
            is_good = accuracy >= TARGET_WORKED_ACCURACY
            if is_good or self.step >= max_steps or monotonic() > deadline_s:
                return accuracy

    def learn_to_guess(self) -> None:
        """Stage two: stops as soon as the policy guesses often enough."""
        self._examples.mix_in_direct(GUESSING_FRACTION)
        self._learning_rate = GUESSING_LEARNING_RATE
        last_step = self.step + MAX_GUESSING_STEPS
        while self.step < last_step:
            count = min(GUESSING_CHECK_EVERY_STEPS, last_step - self.step)
            if self.take_steps(count) <= TARGET_SAMPLED_ACCURACY:
                return

    def take_steps(self, count: int, *, measure: bool = True) -> float:
        """Train ``count`` steps; with ``measure``, return sampled accuracy after the last."""
        for index in range(count):
            self.step += 1
            self.loss = _train_step(
                self._model,
                self._optimizers,
                *self._examples.next_batch(),
                learning_rate=self._learning_rate * min(1.0, self.step / WARMUP_STEPS),
            )
            measured: Accuracy | None = None
            if measure and index == count - 1:
                measured = self.accuracy = measure_accuracy(
                    self._model, self._tokenizer, self._held_out, seed=self._seed
                )
            self._on_progress(
                WarmStartProgress(
                    step=self.step, num_steps=self._num_steps, loss=self.loss, accuracy=measured
                )
            )
        return self.accuracy.sampled if self.accuracy is not None else 0.0


def _train_step(
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    input_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    *,
    learning_rate: float,
) -> float:
    model.train()
    logits_BTV = model(
        input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _optimizers(model: Any) -> Sequence[torch.optim.Optimizer]:
    hidden: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (hidden if is_hidden else others).append(parameter)
    return [
        torch.optim.Muon(
            hidden, lr=LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
