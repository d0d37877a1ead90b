"""Hugging Face as judge of many sequences at once: one forward pass over what an engine said.

Legend: B sequences, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shared.schemas.rollouts import SamplingOptions
from tests.support.models import load_reference

BATCH = 32
LOGIT_TOLERANCE = 5e-5
"""Scores of two right float32 engines differ by less: five times the largest difference seen."""
NUCLEUS_TOLERANCE = 1e-5
"""Totals of float32 probabilities nearer to top-p than this may fall on either side of it. Scores
moved by ``LOGIT_TOLERANCE`` move a total P by at most 2 P (1 - P) of that: 0.9e-5 at P = 0.9."""


@lru_cache(maxsize=16)
def load_judge(path: Path) -> PreTrainedModel:
    """``load_reference``, once per model."""
    return load_reference(path)


@torch.no_grad()
def completion_logits(
    path: Path, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[torch.Tensor]:
    """Logits each completion token was chosen from: per sequence [T, V]."""
    model = load_judge(path)
    logits: list[torch.Tensor] = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(
            zip(prompts[start : start + BATCH], completions[start : start + BATCH], strict=True)
        )
        longest = max(len(prompt) + len(completion) for prompt, completion in chunk)
        ids = torch.zeros(len(chunk), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, completion) in enumerate(chunk):
            length = len(prompt) + len(completion)
            ids[row, :length] = torch.tensor(prompt + completion)
            mask[row, :length] = 1
        scores_BLV = model(ids, attention_mask=mask).logits
        for row, (prompt, completion) in enumerate(chunk):
            first = len(prompt) - 1
            logits.append(scores_BLV[row, first : first + len(completion)])
    return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyVerdict:
    """How an engine's greedy output compares with Hugging Face's, token for token."""

    num_tokens: int
    num_wrong: int
    smallest_margin: float
    """Between the best and the second best logit: far above rounding, or equality is luck."""


def judge_greedy(
    path: Path, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> GreedyVerdict:
    """Every token must be the argmax given all tokens before it.

    By induction this is what ``generate`` would have said, up to and including the first wrong one.
    """
    num_tokens, num_wrong, smallest_margin = 0, 0, float("inf")
    for scores_TV, completion in zip(
        completion_logits(path, prompts, completions), completions, strict=True
    ):
        best = scores_TV.topk(2, dim=-1)
        num_tokens += len(completion)
        num_wrong += int((best.indices[:, 0] != torch.tensor(completion)).sum())
        margins = best.values[:, 0] - best.values[:, 1]
        smallest_margin = min(smallest_margin, float(margins.min()))
    return GreedyVerdict(
        num_tokens=num_tokens, num_wrong=num_wrong, smallest_margin=smallest_margin
    )


def behaviour_logprobs(
    logits_TV: torch.Tensor, prompt: list[int], completion: list[int], sampling: SamplingOptions
) -> torch.Tensor:
    """Log-probabilities [T, V] of the behaviour policy: logit bias, penalties, temperature,
    min-p, top-k, top-p.

    Written out from the definitions, not from vLLM's code; -inf where a token cannot be sampled.
    """
    scores_TV = _scaled_scores(logits_TV, prompt, completion, sampling)
    scores_TV = _after_top_k(_after_min_p(scores_TV, sampling), sampling)
    if sampling.top_p < 1.0:
        ranked_TV, order_TV = scores_TV.softmax(dim=-1).sort(dim=-1, descending=True)
        # The nucleus: the most probable tokens up to the first whose total reaches top_p.
        outside_TV = ranked_TV.cumsum(dim=-1) - ranked_TV >= sampling.top_p
        mask_TV = torch.zeros_like(outside_TV).scatter(1, order_TV, outside_TV)
        scores_TV = scores_TV.masked_fill(mask_TV, float("-inf"))
    return scores_TV.log_softmax(dim=-1)


def support_is_blurred(
    logits_TV: torch.Tensor, prompt: list[int], completion: list[int], sampling: SamplingOptions
) -> torch.Tensor:
    """Bool [T]: rows where rounding decides what min-p, top-k or top-p leave, so that two right
    engines may differ.

    Which rows these are depends on the tokens before them only, never on the token drawn: setting
    them aside biases nothing.
    """
    scores_TV = _scaled_scores(logits_TV, prompt, completion, sampling)
    blurred_T = torch.zeros(len(scores_TV), dtype=torch.bool)
    if sampling.min_p:
        below_best_TV = scores_TV.amax(dim=-1, keepdim=True) - scores_TV
        edge = -math.log(sampling.min_p)
        blurred_T |= ((below_best_TV - edge).abs() < LOGIT_TOLERANCE).any(dim=-1)
        scores_TV = _after_min_p(scores_TV, sampling)
    if sampling.top_k and sampling.top_k < scores_TV.shape[1]:
        best_TK = scores_TV.topk(sampling.top_k + 1).values
        blurred_T |= best_TK[:, -2] - best_TK[:, -1] < LOGIT_TOLERANCE
        scores_TV = _after_top_k(scores_TV, sampling)
    if sampling.top_p < 1.0:
        totals_TV = scores_TV.softmax(dim=-1).sort(dim=-1, descending=True).values.cumsum(dim=-1)
        blurred_T |= ((totals_TV - sampling.top_p).abs() < NUCLEUS_TOLERANCE).any(dim=-1)
    return blurred_T


def _scaled_scores(
    logits_TV: torch.Tensor, prompt: list[int], completion: list[int], sampling: SamplingOptions
) -> torch.Tensor:
    scores_TV = logits_TV.clone()
    for token, bias in sampling.logit_bias.items():
        scores_TV[:, token] += bias
    if _has_penalties(sampling):
        _penalize(scores_TV, prompt, completion, sampling)
    return scores_TV / sampling.temperature


def _after_min_p(scores_TV: torch.Tensor, sampling: SamplingOptions) -> torch.Tensor:
    if not sampling.min_p:
        return scores_TV
    probabilities_TV = scores_TV.softmax(dim=-1)
    floor_T1 = sampling.min_p * probabilities_TV.amax(dim=-1, keepdim=True)
    return scores_TV.masked_fill(probabilities_TV < floor_T1, float("-inf"))


def _after_top_k(scores_TV: torch.Tensor, sampling: SamplingOptions) -> torch.Tensor:
    if not sampling.top_k:
        return scores_TV
    kth_T1 = scores_TV.topk(min(sampling.top_k, scores_TV.shape[1])).values[:, -1:]
    return scores_TV.masked_fill(scores_TV < kth_T1, float("-inf"))


def _has_penalties(sampling: SamplingOptions) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _penalize(
    scores_TV: torch.Tensor, prompt: list[int], completion: list[int], sampling: SamplingOptions
) -> None:
    """Repetition counts the prompt too; presence and frequency count what was said."""
    for step in range(len(completion)):
        said = torch.bincount(
            torch.tensor(completion[:step], dtype=torch.long), minlength=scores_TV.shape[1]
        )
        seen = said > 0
        seen[torch.tensor(prompt)] = True
        row = scores_TV[step]
        penalty = sampling.repetition_penalty
        row = torch.where(seen, torch.where(row > 0, row / penalty, row * penalty), row)
        row = row - sampling.frequency_penalty * said - sampling.presence_penalty * (said > 0)
        scores_TV[step] = row
