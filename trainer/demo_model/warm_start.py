"""Supervised warm start: a policy that can work sums out, but usually guesses.

GRPO needs groups with right and wrong answers, and something to find out. So the warm start has two
stages. First the model learns worked answers until it is right most of the time
(``TARGET_WORKED_ACCURACY``). Then it also sees direct answers (``ans=14`` and no work), as many as
bring sampled accuracy down to ``TARGET_SAMPLED_ACCURACY``: guesses are mostly wrong. What
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
LEARNING_RATE_WARMUP_STEPS = 20
MAX_GRAD_NORM = 1.0
TARGET_WORKED_ACCURACY = 0.65
TARGET_SAMPLED_ACCURACY = 0.28
DIRECT_ACCURACY = 0.05
"""About how often a guess is right; only the mixture is computed from it."""
MAX_DIRECT_FRACTION = 0.75
"""A group of 8 still has a worked answer in it nine times out of ten."""
MIXED_STEPS = 30
CHECK_EVERY_STEPS = 20
FIRST_CHECK_STEP = 100
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
    """Train ``model`` in place, ``num_steps`` steps or about ``MAX_WARM_START_S`` at most."""
    task = ArithmeticTask(task_config)
    held_out = task.held_out(NUM_CHECK_PROBLEMS) if num_steps >= FIRST_CHECK_STEP else []
    examples = ExampleBatches(task, tokenizer, seed)
    optimizers = _optimizers(model)
    deadline_s = monotonic() + MAX_WARM_START_S
    accuracy: Accuracy | None = None
    loss: float | None = None
    last_step = num_steps
    step = 0
    while step < last_step:
        step += 1
        rate = LEARNING_RATE * min(1.0, step / LEARNING_RATE_WARMUP_STEPS)
        loss = _train_step(model, optimizers, *examples.next_batch(), learning_rate=rate)
        # The end of the first stage, wanted or forced; then the last step of the second.
        is_due = step >= FIRST_CHECK_STEP and step % CHECK_EVERY_STEPS == 0
        is_forced = step == num_steps - MIXED_STEPS or monotonic() > deadline_s
        measured: Accuracy | None = None
        if held_out and examples.direct_fraction == 0.0 and (is_due or is_forced):
            measured = accuracy = measure_accuracy(model, tokenizer, held_out, seed=seed)
            if is_forced or measured.sampled >= TARGET_WORKED_ACCURACY:
                examples.mix_in_direct(direct_fraction_for(measured.sampled))
                last_step = step + MIXED_STEPS if examples.direct_fraction else step
        elif held_out and step == last_step:
            measured = accuracy = measure_accuracy(model, tokenizer, held_out, seed=seed)
        on_progress(WarmStartProgress(step=step, num_steps=num_steps, loss=loss, accuracy=measured))
    model.eval()
    return WarmStartResult(num_steps=step, loss=loss, accuracy=accuracy)


def direct_fraction_for(worked_accuracy: float) -> float:
    """Fraction of direct answers that brings a policy to ``TARGET_SAMPLED_ACCURACY``.

    With worked answers right 65 % of the time and guesses 5 %: 0.62, as
    0.62 * 5 % + 0.38 * 65 % = 28 %. Zero for a policy that is not above the target.
    """
    surplus = worked_accuracy - TARGET_SAMPLED_ACCURACY
    if surplus <= 0:
        return 0.0
    return min(MAX_DIRECT_FRACTION, surplus / (worked_accuracy - DIRECT_ACCURACY))


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
