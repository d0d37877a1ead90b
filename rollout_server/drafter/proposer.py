"""vLLM proposer that drafts with a quantized copy of the target over the target's own KV cache.

One cycle, K = 3, a sequence whose accepted tokens fill slots 0..p-1 and whose newest token x was
just sampled (it is not in the cache yet)::

    slot        p-1 | p    p+1  p+2  p+3
    draft pass 1    | x'                      reads 0..p-1 (exact), writes p    -> samples d1
    draft pass 2    | x'   d1'                reads 0..p,           writes p+1  -> samples d2
    draft pass 3    | x'   d1'  d2'           reads 0..p+1,         writes p+2  -> samples d3
    verification    | x    d1   d2   d3       rewrites p..p+3 exactly, accepts a prefix

The primed entries are provisional: the next target pass computes the same positions and overwrites
every one of them, so approximate keys and values never reach the target. Accepted positions are
never run again, which is why drafting can stop and start at any step at no cost. The slots are
reserved by the scheduler (``VllmConfig.num_lookahead_tokens``).

Leans on (vLLM 0.32.0): ``DraftModelProposer``, its ``propose`` signature as called by
``GPUModelRunner.propose_draft_token_ids``, ``_update_positions_dependent_metadata``,
``build_per_group_and_layer_attn_metadata``, ``_determine_batch_execution_and_padding``; positions
past the end of the context get no slot (``PADDING_SLOT_ID``); ``GPUModelRunner.input_batch`` and
``discard_request_mask``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn import Module
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from rollout_server.drafter.draft_sampling import DraftSampler
from rollout_server.drafter.kernels.factory import device_abilities
from rollout_server.drafter.plan import DrafterPlan
from rollout_server.drafter.proposal import Proposal, ProposalBuffer
from rollout_server.drafter.quantization import DrafterQuantizationConfig
from rollout_server.drafter.sharing import (
    allow_provisional_writes,
    draft_linear_methods,
    point_at_target_kv_cache,
    share_target_modules,
    token_embedding,
)
from rollout_server.engine.vllm_plugin.settings import plugin_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftBatch:
    """What of a step's data a draft loop reads."""

    num_drafts: int
    """Per request, at least 1."""
    next_token_ids: torch.Tensor
    """[batch_size], the token each request sampled last."""
    num_rejected: torch.Tensor | None
    """[batch_size], drafts of the previous cycle that verification rejected; the lengths in
    ``attention`` still count them."""
    attention: CommonAttentionMetadata
    sampling: SamplingMetadata


class SelfDraftProposer(DraftModelProposer):
    """Takes the place of ``DraftModelProposer`` in vLLM's model runner."""

    active: ClassVar[SelfDraftProposer | None] = None
    """The proposer of this worker process, for the worker extension."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        settings = plugin_settings(vllm_config)
        self.plan = DrafterPlan.from_config(settings.drafter, device_abilities(device.type))
        self.sampled_token_ids_BJ: torch.Tensor | None = None
        """What the running step sampled; set by ``verified_steps`` before it drafts."""
        self._runner = runner
        self._proposal: Proposal | None = None
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._proposal_buffer = ProposalBuffer(self._vocab_size, device)
        self._one_token_each_cpu = torch.from_numpy(self.token_arange_np).clone()
        type(self).active = self

    def _create_draft_vllm_config(self) -> VllmConfig:
        config = super()._create_draft_vllm_config()
        config.quant_config = DrafterQuantizationConfig(self.plan, self.device.type)
        return config

    def load_model(self, target_model: Module) -> None:
        super().load_model(target_model)
        head = draft_linear_methods(self.model).get("lm_head")
        if head is not None and head.is_tied:
            # The checkpoint has no lm_head: the loader filled the embedding only.
            _, embedding = token_embedding(self.model)
            head.pack(embedding.weight.data)
        share_target_modules(self.model, target_model)
        point_at_target_kv_cache(self._attention_layers(), self._draft_attn_layer_names)

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        allow_provisional_writes(self._attention_layers(), self._draft_attn_layer_names)

    def _attention_layers(self) -> dict[str, Any]:
        return get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Called by vLLM's model runner after each step.

        Returns:
            [batch_size, num_speculative_tokens] token ids.
        """
        if num_speculative_tokens == 0:
            batch_size = common_attn_metadata.num_reqs
            return torch.empty(batch_size, 0, device=self.device, dtype=torch.int64)
        return self._draft(
            DraftBatch(
                num_drafts=num_speculative_tokens,
                next_token_ids=next_token_ids,
                num_rejected=num_rejected_tokens_gpu,
                attention=common_attn_metadata,
                sampling=sampling_metadata,
            )
        )

    def _draft(self, batch: DraftBatch) -> torch.Tensor:
        """[batch_size, num_drafts] token ids, one pass after the other."""
        batch_size = batch.attention.num_reqs
        sampler = DraftSampler(
            batch.sampling,
            self._proposal_buffer,
            num_drafts=batch.num_drafts,
            batch_size=batch_size,
            vocab_size=self._vocab_size,
            sampled_token_ids_BJ=self.sampled_token_ids_BJ,
            unfinished_prompts=self._unfinished_prompts(batch.sampling),
        )
        metadata, positions = self._before_first_pass(batch.attention, batch.num_rejected)
        cudagraph_mode, padded_size, size_across_dp = self._determine_batch_execution_and_padding(
            batch_size
        )
        # Views of buffers that every pass writes anew: made once.
        slot_mapping = self._get_slot_mapping(padded_size)
        input_ids = self.input_ids[:padded_size]
        input_positions = self._get_positions(padded_size)

        token_ids = batch.next_token_ids
        drafts_BK = torch.empty(batch_size, batch.num_drafts, device=self.device, dtype=torch.int64)
        for draft_index in range(batch.num_drafts):
            # Counted here, not taken from its result: past the end of the context that is 0, and
            # the pass after it would write over the sequence's own first positions.
            self._update_positions_dependent_metadata(
                positions + draft_index, metadata, batch_size, padded_size, self.block_size
            )
            _, per_layer_metadata = self.build_per_group_and_layer_attn_metadata(
                metadata, draft_index=draft_index
            )
            input_ids[:batch_size] = token_ids
            with set_forward_context(
                per_layer_metadata,
                self.vllm_config,
                num_tokens=padded_size,
                num_tokens_across_dp=size_across_dp,
                cudagraph_runtime_mode=cudagraph_mode,
                slot_mapping=slot_mapping,
            ):
                hidden_states = self.model(
                    input_ids=input_ids, positions=input_positions, inputs_embeds=None
                )
            logits = self.model.compute_logits(hidden_states[:batch_size])
            token_ids = sampler.sample(draft_index, logits)
            drafts_BK[:, draft_index] = token_ids
        self._proposal = sampler.proposal(self._runner.input_batch.req_ids)
        return drafts_BK

    def _unfinished_prompts(self, sampling: SamplingMetadata) -> frozenset[int]:
        """Rows whose sampled token is discarded; asked for only where a seed depends on it."""
        if not sampling.generators:
            return frozenset()
        discarded = self._runner.discard_request_mask.np
        return frozenset(row for row in sampling.generators if discarded[row])

    def _before_first_pass(
        self, common: CommonAttentionMetadata, num_rejected_tokens: torch.Tensor | None
    ) -> tuple[CommonAttentionMetadata, torch.Tensor]:
        """Attention metadata of one token per request, and the position of each one's last token.

        ``_update_positions_dependent_metadata`` moves the lengths on by one before each pass and
        takes the position each one had then.
        """
        batch_size = common.num_reqs
        # Length before the new token. Cloned: the runner's own buffer must stay as it is.
        seq_lens = common.seq_lens[:batch_size].clone()
        if num_rejected_tokens is not None:
            seq_lens -= num_rejected_tokens
        upper_bound = common.seq_lens_cpu_upper_bound
        metadata = replace(
            common,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=None if upper_bound is None else upper_bound.clone(),
            num_actual_tokens=batch_size,
            max_query_len=1,
            query_start_loc=self.arange[: batch_size + 1],
            query_start_loc_cpu=self._one_token_each_cpu[: batch_size + 1],
        )
        return metadata, seq_lens.to(torch.int64) - 1

    def take_proposal(self) -> Proposal | None:
        """The last cycle's distributions; gone afterwards, so that no later drafts meet them."""
        proposal, self._proposal = self._proposal, None
        return proposal
