"""Accepts or replaces vLLM drafts so that the output has exactly the target's distribution.

The rule (speculative sampling, arXiv 2211.17192): a draft d drawn from q is kept with probability
``min(1, p(d) / q(d))``; the first one that is not is replaced by a token drawn from
``max(0, p - q)``; if all are kept, one more token is drawn from p. A greedy request keeps drafts
that are the target's likeliest token.

Only one row per request is ever drawn from (the first rejected one, or the last), and no decision
waits for the device. Works on vLLM's types but calls nothing of vLLM's model runner.

Legend: B requests, D drafts in all, T = D + B rows of target logits (a request's drafts, then the
row after the last one), N the most drafts of a request, V vocabulary.

Leans on (vLLM 0.32.0): ``SpecDecodeMetadata`` (rows of ``logits`` are request by request),
``SamplerOutput``, ``Sampler.gather_logprobs``; replaces ``RejectionSampler.forward``, whose output
(``[B, N + 1]`` token ids, -1 after the last) it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from rollout_server.drafter.constraints import (
    GREEDY_TEMPERATURE,
    Rows,
    TokenCounts,
    apply_constraints,
)
from rollout_server.drafter.noise import draw_tokens, draw_uniforms, likeliest_tokens
from rollout_server.drafter.proposal import NOT_PROPOSED, Proposal

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """Where each draft's row is; built on the host from the draft counts alone."""

    num_drafts: list[int]  # [B]
    request_of_row_T: torch.Tensor
    row_of_position_BN1: torch.Tensor  # position j of request i; the last row past its end
    position_of_row_T: torch.Tensor  # inverse of the above, flat
    draft_of_position_BN: torch.Tensor  # index into [D]; 0 where there is none
    is_draft_BN: torch.Tensor  # bool

    @classmethod
    def build(cls, num_drafts: Sequence[int], device: torch.device) -> DraftLayout:
        counts = np.asarray(num_drafts, dtype=np.int64)
        most = int(counts.max())
        num_rows = counts + 1
        starts = np.cumsum(num_rows) - num_rows
        request_of_row = np.repeat(np.arange(len(counts)), num_rows)
        offset_in_request = np.arange(num_rows.sum()) - starts[request_of_row]
        positions = np.arange(most + 1)
        drafts_before = np.cumsum(counts) - counts
        is_draft = positions[None, :most] < counts[:, None]
        row_of_position = starts[:, None] + np.minimum(positions[None], counts[:, None])
        draft_of_position = np.where(is_draft, drafts_before[:, None] + positions[None, :most], 0)
        position_of_row = request_of_row * (most + 1) + offset_in_request

        def upload(array: Any) -> torch.Tensor:
            return async_tensor_h2d(np.ascontiguousarray(array), device=device)

        return cls(
            num_drafts=counts.tolist(),
            request_of_row_T=upload(request_of_row),
            row_of_position_BN1=upload(row_of_position),
            position_of_row_T=upload(position_of_row),
            draft_of_position_BN=upload(draft_of_position),
            is_draft_BN=upload(is_draft),
        )


def verify(
    logits_TV: torch.Tensor,
    draft_token_ids_D: torch.Tensor,
    num_drafts: Sequence[int],
    sampling: SamplingMetadata,
    proposal: Proposal | None,
    request_ids: Sequence[str],
) -> SamplerOutput:
    """Token ids and, when asked for, logprobs of one verification pass.

    Drafts of a request that ``proposal`` does not cover are taken as given (q is 1 at the draft),
    which is exact too and only accepts less.

    Args:
        logits_TV: the target's, before any processing.
        num_drafts: [B], at least one of them above 0.
        request_ids: [B].
    """
    device = logits_TV.device
    layout = DraftLayout.build(num_drafts, device)
    batch_size, most = layout.is_draft_BN.shape
    drafts_BN = draft_token_ids_D.to(torch.int64)[layout.draft_of_position_BN]
    logits_TV = _constrained(logits_TV.to(torch.float32), drafts_BN, layout, sampling)

    accepted_BN = torch.zeros_like(layout.is_draft_BN)
    is_greedy_B: torch.Tensor | None = None
    likeliest_BN1: torch.Tensor | None = None
    if not sampling.all_random:
        likeliest_BN1 = likeliest_tokens(logits_TV)[layout.row_of_position_BN1]
        accepted_BN = drafts_BN == likeliest_BN1[:, :most]
        if not sampling.all_greedy:
            assert sampling.temperature is not None
            is_greedy_B = sampling.temperature < GREEDY_TEMPERATURE

    logprobs_TV: torch.Tensor | None = None
    if not sampling.all_greedy or sampling.max_num_logprobs is not None:
        logprobs_TV = logits_TV.log_softmax(dim=-1)
    draft_rows_BN = layout.row_of_position_BN1[:, :most]
    source: _ProposedRows | None = None
    if not sampling.all_greedy:
        assert logprobs_TV is not None
        source = _ProposedRows.build(proposal, request_ids, device)
        uniforms = draw_uniforms(layout.num_drafts, sampling.generators, device)
        target_BN = logprobs_TV[draft_rows_BN, drafts_BN.clamp_min(0)].exp().to(torch.float64)
        kept_BN = (
            uniforms[layout.draft_of_position_BN] * source.probability_of(drafts_BN) < target_BN
        )
        accepted_BN = (
            kept_BN
            if is_greedy_B is None
            else torch.where(is_greedy_B.unsqueeze(1), accepted_BN, kept_BN)
        )

    accepted_BN &= layout.is_draft_BN & (drafts_BN >= 0)
    num_accepted_B1 = accepted_BN.to(torch.int64).cumprod(dim=1).sum(dim=1, keepdim=True)
    last_B1: torch.Tensor
    if source is None:
        assert likeliest_BN1 is not None
        last_B1 = likeliest_BN1.gather(1, num_accepted_B1)
    else:
        assert logprobs_TV is not None
        last_row_B = layout.row_of_position_BN1.gather(1, num_accepted_B1).squeeze(1)
        was_rejected_B = num_accepted_B1.squeeze(1) < layout.is_draft_BN.sum(dim=1)
        weights_BV = source.residual(
            logprobs_TV[last_row_B].exp_(), drafts_BN, num_accepted_B1, was_rejected_B
        )
        last_B1 = draw_tokens(weights_BV, sampling.generators).unsqueeze(1)
        if is_greedy_B is not None:
            assert likeliest_BN1 is not None
            greedy_B1 = likeliest_BN1.gather(1, num_accepted_B1)
            last_B1 = torch.where(is_greedy_B.unsqueeze(1), greedy_B1, last_B1)

    token_ids_BN1 = torch.full((batch_size, most + 1), NO_TOKEN, dtype=torch.int64, device=device)
    is_kept_BN = torch.arange(most, device=device).unsqueeze(0) < num_accepted_B1
    token_ids_BN1[:, :most] = torch.where(is_kept_BN, drafts_BN, NO_TOKEN)
    token_ids_BN1.scatter_(1, num_accepted_B1, last_B1)
    logprobs = None
    if sampling.max_num_logprobs is not None:
        assert logprobs_TV is not None
        logprobs = _gather_logprobs(logprobs_TV, token_ids_BN1, layout, sampling.max_num_logprobs)
    return SamplerOutput(sampled_token_ids=token_ids_BN1.to(torch.int32), logprobs_tensors=logprobs)


def _constrained(
    logits_TV: torch.Tensor,
    drafts_BN: torch.Tensor,
    layout: DraftLayout,
    sampling: SamplingMetadata,
) -> torch.Tensor:
    """Logits after everything the request asked for; row j knows of the j drafts before it."""
    rows = Rows(
        num_rows=[count + 1 for count in layout.num_drafts],
        request_of_row=layout.request_of_row_T,
        drafts=sampling.spec_token_ids if sampling.bad_words_token_ids else None,
    )
    counts_TV: torch.Tensor | None = None
    in_prompt_TV: torch.Tensor | None = None
    if not sampling.no_penalties:
        counts = TokenCounts(sampling, logits_TV.shape[-1])
        counts_TV = rows.expand(counts.outputs_BV)
        in_prompt_TV = rows.expand(counts.in_prompt_BV)
        most = drafts_BN.shape[1]
        position_T = layout.position_of_row_T % (most + 1)
        before_TN = torch.arange(most, device=logits_TV.device).unsqueeze(0) < position_T[:, None]
        drafts_TN = rows.expand(drafts_BN)
        is_counted_TN = before_TN & (drafts_TN >= 0)
        counts_TV.scatter_add_(1, drafts_TN.clamp_min(0), is_counted_TN.to(counts_TV.dtype))
    return apply_constraints(
        logits_TV, sampling, rows, counts_RV=counts_TV, in_prompt_RV=in_prompt_TV
    )


@dataclass(frozen=True, slots=True)
class _ProposedRows:
    """The proposal seen from the batch that is being verified."""

    probabilities_KBV: torch.Tensor | None
    row_B1: torch.Tensor  # 0 where the request was not proposed for
    is_known_B1: torch.Tensor | None  # bool; None: all are

    @classmethod
    def build(
        cls, proposal: Proposal | None, request_ids: Sequence[str], device: torch.device
    ) -> _ProposedRows:
        probabilities_KBV = None if proposal is None else proposal.probabilities_KBV
        found = [NOT_PROPOSED] * len(request_ids)
        if proposal is not None and probabilities_KBV is not None:
            found = proposal.rows(request_ids)
        row_B1 = async_tensor_h2d(found, device=device, dtype=torch.int64).unsqueeze(1)
        return cls(
            probabilities_KBV=probabilities_KBV,
            row_B1=row_B1.clamp_min(0),
            is_known_B1=None if NOT_PROPOSED not in found else row_B1 != NOT_PROPOSED,
        )

    def probability_of(self, drafts_BN: torch.Tensor) -> torch.Tensor:
        """q of each draft, float64 [B, N]; 1 where it was not proposed with a distribution."""
        if self.probabilities_KBV is None:
            return torch.ones_like(drafts_BN, dtype=torch.float64)
        # A request may have fewer drafts than the cycle made, never more.
        step_1N = torch.arange(drafts_BN.shape[1], device=drafts_BN.device).unsqueeze(0)
        step_1N = step_1N.clamp_max(self.probabilities_KBV.shape[0] - 1)
        q_BN = self.probabilities_KBV[step_1N, self.row_B1, drafts_BN.clamp_min(0)]
        q_BN = q_BN.to(torch.float64)
        return q_BN if self.is_known_B1 is None else torch.where(self.is_known_B1, q_BN, 1.0)

    def residual(
        self,
        target_BV: torch.Tensor,
        drafts_BN: torch.Tensor,
        num_accepted_B1: torch.Tensor,
        was_rejected_B: torch.Tensor,
    ) -> torch.Tensor:
        """Weights the last token is drawn with: ``max(0, p - q)`` after a rejection, else p.

        Args:
            target_BV: p at each request's last row; overwritten.
        """
        rejected_position_B1 = num_accepted_B1.clamp_max(drafts_BN.shape[1] - 1)
        rejected_B1 = drafts_BN.gather(1, rejected_position_B1).clamp_min(0)
        if self.probabilities_KBV is None:
            q_BV = torch.zeros_like(target_BV).scatter_(1, rejected_B1, 1.0)
        else:
            step_B = rejected_position_B1.squeeze(1).clamp_max(self.probabilities_KBV.shape[0] - 1)
            q_BV = self.probabilities_KBV[step_B, self.row_B1.squeeze(1)]
            if self.is_known_B1 is not None:
                one_hot_BV = torch.zeros_like(target_BV).scatter_(1, rejected_B1, 1.0)
                q_BV = torch.where(self.is_known_B1, q_BV, one_hot_BV)
        residual_BV = (target_BV - q_BV).clamp_min_(0)
        # p = q to the last bit leaves nothing; a rejection is then rounding, and p is as good.
        use_residual_B1 = was_rejected_B.unsqueeze(1) & (residual_BV.sum(1, keepdim=True) > 0)
        return torch.where(use_residual_B1, residual_BV, target_BV)


def _gather_logprobs(
    logprobs_TV: torch.Tensor, token_ids_BN1: torch.Tensor, layout: DraftLayout, num_logprobs: int
) -> LogprobsTensors:
    """Logprobs per position [B * (N + 1), ...]; positions without a token hold anything."""
    token_of_row_T = token_ids_BN1.flatten()[layout.position_of_row_T].clamp_min(0)
    if num_logprobs == 0:
        by_row = _sampled_logprobs(logprobs_TV, token_of_row_T.unsqueeze(1))
    else:
        by_row = Sampler.gather_logprobs(logprobs_TV, num_logprobs, token_of_row_T)
    row_of_position = layout.row_of_position_BN1.flatten()
    return LogprobsTensors(
        by_row.logprob_token_ids[row_of_position],
        by_row.logprobs[row_of_position],
        by_row.selected_token_ranks[row_of_position],
    )


def _sampled_logprobs(logprobs_TV: torch.Tensor, token_T1: torch.Tensor) -> LogprobsTensors:
    """``Sampler.gather_logprobs`` for no alternatives, without its search for the likeliest."""
    logprobs_T1 = logprobs_TV.gather(1, token_T1)
    ranks_T = (logprobs_TV >= logprobs_T1).sum(dim=-1)
    return LogprobsTensors(token_T1.to(torch.int32), logprobs_T1, ranks_T)
