"""Supervised warm start on worked sums, until the policy is right often enough for rewards.

GRPO needs groups with both right and wrong answers, so the warm start stops where sampled accuracy
reaches ``TARGET_SAMPLED_ACCURACY``, not where it is best. Hidden matrices are trained by Muon
(https://arxiv.org/abs/2502.16982), which needs about half the steps AdamW needs here.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any

import torch

from shared.config.trainer import ArithmeticTaskConfig
from trainer.demo_model.accuracy import Accuracy, measure_accuracy
from trainer.tasks.arithmetic import ArithmeticTask

BATCH_SIZE = 32
BATCHES_PER_POOL = 8
LEARNING_RATE = 2e-3
LEARNING_RATE_WARMUP_STEPS = 20
MAX_GRAD_NORM = 1.0
TARGET_SAMPLED_ACCURACY = 0.28
CHECK_EVERY_STEPS = 20
FIRST_CHECK_STEP = 60
NUM_CHECK_PROBLEMS = 96
MAX_WARM_START_S = 300.0
IGNORED_LABEL = -100


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
    """Train ``model`` in place, at most ``num_steps`` steps or ``MAX_WARM_START_S`` seconds."""
    task = ArithmeticTask(task_config)
    batches = _batches(task, tokenizer, seed)
    optimizers = _optimizers(model)
    held_out = task.held_out(NUM_CHECK_PROBLEMS) if num_steps >= FIRST_CHECK_STEP else []
    accuracy: Accuracy | None = None
    loss_value: float | None = None
    deadline_s = monotonic() + MAX_WARM_START_S
    step = 0
    for step in range(1, num_steps + 1):
        input_ids_BT, labels_BT = next(batches)
        model.train()
        logits_BTV = model(
            input_ids=input_ids_BT,
            attention_mask=(input_ids_BT != tokenizer.pad_token_id).long(),
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / LEARNING_RATE_WARMUP_STEPS)
            optimizer.step()
            optimizer.zero_grad()
        loss_value = float(loss.detach())
        measured = None
        if step >= FIRST_CHECK_STEP and (step % CHECK_EVERY_STEPS == 0 or step == num_steps):
            measured = accuracy = measure_accuracy(model, tokenizer, held_out, seed=seed)
        on_progress(
            WarmStartProgress(step=step, num_steps=num_steps, loss=loss_value, accuracy=measured)
        )
        if measured is not None and measured.sampled >= TARGET_SAMPLED_ACCURACY:
            break
        if monotonic() > deadline_s:
            break
    model.eval()
    return WarmStartResult(num_steps=step, loss=loss_value, accuracy=accuracy)


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


def _batches(
    task: ArithmeticTask, tokenizer: Any, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar length without end: a pool of examples is sorted, cut and shuffled."""
    examples = task.training_stream(seed)
    rng = random.Random(seed)
    while True:
        pool = [
            (tokenizer.encode(item.prompt), tokenizer.encode(item.worked_answer))
            for item in islice(examples, BATCH_SIZE * BATCHES_PER_POOL)
        ]
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(pool), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            yield _pad(pool[start : start + BATCH_SIZE], tokenizer)


def _pad(
    pairs: Sequence[tuple[list[int], list[int]]], tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels; only answers (and the end of sequence) carry loss."""
    width = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
    input_ids_BT = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(pairs), width), IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(pairs):
        completion = torch.tensor([*answer, tokenizer.eos_token_id])
        end = len(prompt) + len(completion)
        input_ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        input_ids_BT[row, len(prompt) : end] = completion
        labels_BT[row, len(prompt) : end] = completion
    return input_ids_BT, labels_BT
