"""How often a model is right on held-out sums, greedily and sampled at temperature 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from trainer.tasks.problem import Problem

MAX_NEW_TOKENS = 128
ANSWER_MARKER = "ans="


class Accuracy(BaseModel):
    """Fractions 0..1 of ``num_problems``."""

    model_config = ConfigDict(frozen=True)

    greedy: float
    sampled: float
    num_problems: int


def measure_accuracy(
    model: Any, tokenizer: Any, problems: Sequence[Problem], *, seed: int
) -> Accuracy:
    """Generate once greedily and once at temperature 1 for every problem.

    The global random state is left as it was.
    """
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        greedy, sampled = (
            _fraction_right(model, tokenizer, problems, do_sample) for do_sample in (False, True)
        )
    return Accuracy(greedy=greedy, sampled=sampled, num_problems=len(problems))


def is_right(completion: str, answer: str) -> bool:
    """Whether what follows the last ``ans=`` is the answer and nothing else."""
    _, marker, found = completion.rpartition(ANSWER_MARKER)
    return bool(marker) and found.strip() == answer


def _fraction_right(
    model: Any, tokenizer: Any, problems: Sequence[Problem], do_sample: bool
) -> float:
    encoded = tokenizer(
        [problem.prompt_text for problem in problems], return_tensors="pt", padding=True
    )
    output_BT = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=do_sample,
        temperature=1.0 if do_sample else None,
        top_k=0 if do_sample else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    num_prompt_tokens = encoded["input_ids"].shape[1]
    completions = tokenizer.batch_decode(output_BT[:, num_prompt_tokens:], skip_special_tokens=True)
    num_right = sum(
        is_right(completion, problem.answer)
        for completion, problem in zip(completions, problems, strict=True)
    )
    return num_right / len(problems)
