"""A step's sampling parameters applied to rows of vLLM logits, for verification and for drafting.

A verification step scores several rows of one request, row j standing after j of its drafts; a
draft pass scores one row of each request. Both shape their rows with the same code here, in the
order of vLLM's own sampler: allowed tokens, bad words, logit bias and minimum length, penalties,
temperature, min-p, top-k and top-p. All tensors stay on the device; nothing here waits for it.

Legend: B requests, R rows, V vocabulary.

Leans on (vLLM 0.32.0): ``SamplingMetadata``; ``MinPLogitsProcessor.min_p`` and ``min_p_count``,
``LogitBiasLogitsProcessor.biases``, ``MinTokensLogitsProcessor.apply_with_spec_decode`` (masks row
j of a request as its j-th next token); ``apply_bad_words_with_drafts``; ``apply_top_k_top_p``;
``vllm._custom_ops.apply_repetition_penalties``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.bad_words import apply_bad_words_with_drafts
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

GREEDY_TEMPERATURE = 1e-5
"""vLLM's ``_SAMPLING_EPS``: a temperature below it means greedy."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which request each row of logits belongs to."""

    num_rows: Sequence[int]  # [B], rows of each request, all of a request next to each other
    request_of_row: torch.Tensor | None  # int64 [R]; None: one row per request, in order
    drafts: Sequence[Sequence[int]] | None = None
    """[B] drafted tokens of each request; row j stands after the first j of them. Only read on the
    host where bad words need whole sequences."""

    def expand(self, values_B: torch.Tensor) -> torch.Tensor:
        """A per-request tensor [B, ...] as a per-row one [R, ...]."""
        return values_B if self.request_of_row is None else values_B[self.request_of_row]


def one_row_each(num_requests: int) -> Rows:
    """A draft pass: one row per request."""
    return Rows(num_rows=[1] * num_requests, request_of_row=None)


class TokenCounts:
    """How often each token occurs in prompts and outputs: what penalties are made of."""

    def __init__(self, metadata: SamplingMetadata, vocab_size: int) -> None:
        assert metadata.prompt_token_ids is not None
        self.in_prompt_BV = _counts(metadata.prompt_token_ids, vocab_size) > 0
        longest = max((len(tokens) for tokens in metadata.output_token_ids), default=0)
        padded = np.full((len(metadata.output_token_ids), longest), vocab_size, dtype=np.int64)
        for row, tokens in enumerate(metadata.output_token_ids):
            padded[row, : len(tokens)] = tokens
        padded[padded < 0] = vocab_size  # placeholders of asynchronous scheduling
        device = metadata.prompt_token_ids.device
        self.outputs_BV = _counts(async_tensor_h2d(padded, device=device), vocab_size)

    def add(self, token_ids_BJ: torch.Tensor) -> None:
        """Count more output tokens in place; negative ids are padding."""
        token_ids_BJ = token_ids_BJ.to(torch.int64)
        valid_BJ = (token_ids_BJ >= 0).to(self.outputs_BV.dtype)
        self.outputs_BV.scatter_add_(1, token_ids_BJ.clamp_min(0), valid_BJ)


def _counts(token_ids_BJ: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """int64 [B, V]; ids equal to ``vocab_size`` are padding."""
    counts = torch.zeros(
        (token_ids_BJ.shape[0], vocab_size + 1), dtype=torch.int64, device=token_ids_BJ.device
    )
    counts.scatter_add_(1, token_ids_BJ, torch.ones_like(token_ids_BJ))
    return counts[:, :vocab_size].contiguous()


def apply_constraints(
    logits_RV: torch.Tensor,
    metadata: SamplingMetadata,
    rows: Rows,
    *,
    counts_RV: torch.Tensor | None = None,
    in_prompt_RV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shape float32 logits, in place where that is possible, up to and including top-p.

    Greedy requests of a mixed batch keep their scale (vLLM divides them by 1).

    Args:
        counts_RV, in_prompt_RV: ``TokenCounts`` per row; needed when the batch has penalties.

    Returns:
        [R, V] whose softmax is the distribution the row's next token has.
    """
    if metadata.allowed_token_ids_mask is not None:
        logits_RV.masked_fill_(rows.expand(metadata.allowed_token_ids_mask), float("-inf"))
    if metadata.bad_words_token_ids and rows.drafts is not None:
        apply_bad_words_with_drafts(
            logits_RV, metadata.bad_words_token_ids, _histories(metadata, rows), list(rows.num_rows)
        )
    for processor in metadata.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            logits_RV = processor.apply_with_spec_decode(logits_RV, list(rows.num_rows))
        elif isinstance(processor, LogitBiasLogitsProcessor):
            _apply_logit_bias(logits_RV, processor.biases, rows)
    if not metadata.no_penalties:
        assert counts_RV is not None
        assert in_prompt_RV is not None
        _apply_penalties(logits_RV, metadata, rows, counts_RV, in_prompt_RV)
    if metadata.all_greedy:
        return logits_RV
    assert metadata.temperature is not None
    temperature_B = metadata.temperature
    if not metadata.all_random:
        temperature_B = torch.where(temperature_B < GREEDY_TEMPERATURE, 1.0, temperature_B)
    logits_RV.div_(rows.expand(temperature_B).unsqueeze(1))
    for processor in metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            _apply_min_p(logits_RV, rows.expand(processor.min_p))
    if metadata.top_k is None and metadata.top_p is None:
        return logits_RV
    return apply_top_k_top_p(
        logits_RV,
        None if metadata.top_k is None else rows.expand(metadata.top_k),
        None if metadata.top_p is None else rows.expand(metadata.top_p),
    )


def _histories(metadata: SamplingMetadata, rows: Rows) -> list[list[int]]:
    """[R] output tokens before each row, drafts included."""
    assert rows.drafts is not None
    return [
        [*output, *drafts[:position]]
        for output, drafts, num_rows in zip(
            metadata.output_token_ids, rows.drafts, rows.num_rows, strict=True
        )
        for position in range(num_rows)
    ]


def _apply_logit_bias(logits_RV: torch.Tensor, biases: dict[int, Any], rows: Rows) -> None:
    if not biases:
        return
    ends = np.cumsum(rows.num_rows)
    row_ids: list[int] = []
    token_ids: list[int] = []
    values: list[float] = []
    for request, bias in biases.items():
        for row in range(int(ends[request]) - rows.num_rows[request], int(ends[request])):
            row_ids += [row] * len(bias)
            token_ids += bias.keys()
            values += bias.values()
    device = logits_RV.device
    index = (
        async_tensor_h2d(row_ids, device=device, dtype=torch.int64),
        async_tensor_h2d(token_ids, device=device, dtype=torch.int64),
    )
    bias_values = async_tensor_h2d(values, device=device, dtype=torch.float32)
    logits_RV.index_put_(index, bias_values, accumulate=True)


def _apply_penalties(
    logits_RV: torch.Tensor,
    metadata: SamplingMetadata,
    rows: Rows,
    counts_RV: torch.Tensor,
    in_prompt_RV: torch.Tensor,
) -> None:
    in_output_RV = counts_RV > 0
    ops.apply_repetition_penalties(
        logits_RV, in_prompt_RV, in_output_RV, rows.expand(metadata.repetition_penalties)
    )
    logits_RV -= rows.expand(metadata.frequency_penalties).unsqueeze(1) * counts_RV
    logits_RV -= rows.expand(metadata.presence_penalties).unsqueeze(1) * in_output_RV


def _apply_min_p(logits_RV: torch.Tensor, min_p_R1: torch.Tensor) -> None:
    """Drop tokens less likely than ``min_p`` times the likeliest."""
    probabilities_RV = logits_RV.softmax(dim=-1)
    least_R1 = probabilities_RV.amax(dim=-1, keepdim=True).mul_(min_p_R1)
    logits_RV.masked_fill_(probabilities_RV < least_R1, float("-inf"))
