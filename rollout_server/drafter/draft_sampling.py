"""Draws vLLM draft tokens the way their request samples, and keeps their distribution.

A draft is worth most when its distribution is near the one verification will hold it against: so
drafts follow temperature, top-k, top-p, min-p, penalties, logit bias and allowed tokens. Bad words
do not shape drafts (they need whole sequences on the host); verification rejects those.

Legend: B requests, K drafts each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.v1.sample.metadata import SamplingMetadata

from rollout_server.drafter.constraints import (
    GREEDY_TEMPERATURE,
    TokenCounts,
    apply_constraints,
    one_row_each,
)
from rollout_server.drafter.noise import draw_tokens, likeliest_tokens
from rollout_server.drafter.proposal import Proposal, ProposalBuffer


class DraftSampler:
    """The sampling side of one draft cycle."""

    def __init__(
        self,
        sampling: SamplingMetadata,
        buffer: ProposalBuffer,
        *,
        num_drafts: int,
        batch_size: int,
        vocab_size: int,
        sampled_token_ids_BJ: torch.Tensor | None,
        unfinished_prompts: frozenset[int] = frozenset(),
    ) -> None:
        """
        Args:
            sampled_token_ids_BJ: what the step before sampled, -1 where nothing; vLLM books these
                tokens only after drafting, and penalties must know them.
            unfinished_prompts: requests whose prompt is prefilled in pieces and not done. Their
                drafts are thrown away, and must not use up a seed's numbers: how a prompt is cut
                depends on who else is in the batch.
        """
        self._sampling = sampling
        self._generators = {
            request: generator
            for request, generator in sampling.generators.items()
            if request not in unfinished_prompts
        }
        self._rows = one_row_each(batch_size)
        self._probabilities_KBV = (
            None if sampling.all_greedy else buffer.view(num_drafts, batch_size)
        )
        self._is_greedy_B: torch.Tensor | None = None
        if not sampling.all_greedy and not sampling.all_random:
            assert sampling.temperature is not None
            self._is_greedy_B = sampling.temperature < GREEDY_TEMPERATURE
        self._counts: TokenCounts | None = None
        if not sampling.no_penalties:
            self._counts = TokenCounts(sampling, vocab_size)
            if sampled_token_ids_BJ is not None:
                self._counts.add(sampled_token_ids_BJ)

    def sample(self, draft_index: int, logits_BV: torch.Tensor) -> torch.Tensor:
        """The ``draft_index``-th draft of every request, int64 [B].

        Args:
            logits_BV: the drafter's; overwritten.
        """
        counts = self._counts
        logits_BV = apply_constraints(
            logits_BV.to(torch.float32),
            self._sampling,
            self._rows,
            counts_RV=None if counts is None else counts.outputs_BV,
            in_prompt_RV=None if counts is None else counts.in_prompt_BV,
        )
        if self._probabilities_KBV is None:
            tokens_B = likeliest_tokens(logits_BV)
        else:
            probabilities_BV = torch.softmax(
                logits_BV, dim=-1, out=self._probabilities_KBV[draft_index]
            )
            greedy_B = None if self._is_greedy_B is None else likeliest_tokens(logits_BV)
            # Drawing overwrites its weights on CUDA: verification needs them whole.
            weights_BV = probabilities_BV.clone() if probabilities_BV.is_cuda else probabilities_BV
            tokens_B = draw_tokens(weights_BV, self._generators)
            if greedy_B is not None:
                assert self._is_greedy_B is not None
                tokens_B = torch.where(self._is_greedy_B, greedy_B, tokens_B)
        if counts is not None:
            counts.add(tokens_B.unsqueeze(1))
        return tokens_B

    def proposal(self, request_ids: Sequence[str]) -> Proposal:
        """What verification needs to know of the cycle."""
        return Proposal(list(request_ids), self._probabilities_KBV)
