"""vLLM proposer for CUDA: replays whole draft loops as graphs, and packs from the target.

Takes the place of ``SelfDraftProposer`` on CUDA. A batch that no captured loop fits, that has
requests with seeds of their own, or whose sampling is shaped by more than a temperature, is drafted
by the parent's loop.

FlashAttention 3 in a full graph: the metadata is built inside the capture, so that its scheduling
kernel is replayed with the sequence lengths of the moment; ``max_seq_len`` is baked in, hence the
model's limit, and the number of splits is vLLM's upper bound for graphs.

Leans on (vLLM 0.32.0): ``AttentionGroup.build_metadata``, ``CommonAttentionMetadata``,
``graph_capture``, ``capture_pool``, ``GPUModelRunner._freeze_gc``, ``InputBatch.block_table``,
``NULL_BLOCK_ID`` 0 (what padding rows point at), ``LoadConfig.load_format``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata

from rollout_server.drafter.cuda_graphs import (
    DraftLoopGraphs,
    LoopShape,
    cuda_graph_recorder,
    graph_batch_sizes,
)
from rollout_server.drafter.loop_buffers import LoopBuffers, StepTables, sample_drafts
from rollout_server.drafter.proposal import Proposal
from rollout_server.drafter.proposer import DraftBatch, SelfDraftProposer
from rollout_server.drafter.target_packing import pack_from_target

DUMMY_LOAD_FORMAT = "dummy"


def needs_temperature_alone(metadata: SamplingMetadata) -> bool:
    """Whether a batch draws its drafts by temperature and the default generator, as graphs do."""
    return (
        not metadata.generators
        and metadata.no_penalties
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.allowed_token_ids_mask is None
        and not any(
            getattr(processor, "min_p_count", 0) or getattr(processor, "biases", None)
            for processor in metadata.logitsprocs.all
        )
    )


class GraphedSelfDraftProposer(SelfDraftProposer):
    """``SelfDraftProposer`` whose loops are CUDA graphs."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        SelfDraftProposer.active = self
        self._max_draft_length = self.num_speculative_tokens
        self._probabilities: torch.Tensor | None = None
        self.loop_buffers: LoopBuffers | None = None
        self.loop_graphs: DraftLoopGraphs | None = None
        """None until captured, and in engines without graphs."""

    def load_model(self, target_model: Module) -> None:
        super().load_model(target_model)
        if self.vllm_config.load_config.load_format == DUMMY_LOAD_FORMAT:
            # Dummy weights are random per tensor: a drafter of its own would be another policy.
            pack_from_target(self.model, target_model)
        if self._uses_graphs():
            # Before vLLM measures what is left for the KV cache.
            num_values = self._graph_batch_sizes()[-1] * self._max_draft_length * self._vocab_size
            self._probabilities = torch.empty(num_values, dtype=torch.float32, device=self.device)

    def _uses_graphs(self) -> bool:
        return (
            self.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
            and not self.speculative_config.enforce_eager
            and self.vllm_config.parallel_config.data_parallel_size == 1
            and len(self._graph_batch_sizes()) > 0
        )

    def _graph_batch_sizes(self) -> tuple[int, ...]:
        bytes_per_row = self._max_draft_length * self._vocab_size * 4
        return graph_batch_sizes(self.max_batch_size, bytes_per_row=bytes_per_row)

    @torch.inference_mode()
    def capture_draft_loops(self) -> int:
        """Capture every loop; called in the worker's capture phase.

        Returns:
            Number of graphs, 0 in an engine without graphs.
        """
        if self._probabilities is None:
            return 0
        batch_sizes = self._graph_batch_sizes()
        table = self._runner.input_batch.block_table[self.kv_cache_gid].get_device_tensor(1)
        self.loop_buffers = LoopBuffers(
            max_batch_size=batch_sizes[-1],
            max_draft_length=self._max_draft_length,
            num_block_columns=table.shape[1],
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            probabilities=self._probabilities,
        )
        pool = current_platform.get_global_graph_pool()
        with (
            self._runner._freeze_gc(),
            graph_capture(device=self.device),
            capture_pool(pool, self.vllm_config) as shared_pool,
        ):
            graphs = DraftLoopGraphs(cuda_graph_recorder(shared_pool))
            graphs.capture(batch_sizes, range(1, self._max_draft_length + 1), self.run_loop)
        torch.cuda.synchronize()
        self.loop_graphs = graphs
        return len(graphs)

    @torch.inference_mode()
    def run_loop(self, shape: LoopShape) -> None:
        """All steps of a loop over ``loop_buffers``, launched one by one."""
        buffers = self.loop_buffers
        assert buffers is not None, "the loop runs over buffers that capturing makes"
        size = shape.batch_size
        tables = buffers.step_tables(shape)
        draft_token_ids_BK = buffers.draft_token_ids(shape)
        probabilities_KBV = buffers.probabilities(shape, self._vocab_size)
        token_ids_B = buffers.first_token_ids_B[:size]
        for step in range(shape.draft_length):
            slots_B = tables.slots_KB[step]
            self.input_ids[:size].copy_(token_ids_B)
            with set_forward_context(
                self._step_metadata(shape, tables, step),
                self.vllm_config,
                num_tokens=size,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots_B),
            ):
                hidden_states = self.model(
                    input_ids=self.input_ids[:size],
                    positions=tables.positions_KB[step],
                    inputs_embeds=None,
                )
            logits_BV = self.model.compute_logits(hidden_states)
            token_ids_B = sample_drafts(
                logits_BV, buffers.temperature(shape), probabilities_KBV[step]
            )
            draft_token_ids_BK[:, step].copy_(token_ids_B)

    def _step_metadata(self, shape: LoopShape, tables: StepTables, step: int) -> dict[str, Any]:
        size = shape.batch_size
        assert self.loop_buffers is not None
        common = CommonAttentionMetadata(
            query_start_loc=self.arange[: size + 1],
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: size + 1]),
            seq_lens=tables.seq_lens_KB[step],
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=self.max_model_len,
            block_table_tensor=self.loop_buffers.block_table(shape),
            slot_mapping=tables.slots_KB[step],
            seq_lens_cpu_upper_bound=torch.full((size,), self.max_model_len, dtype=torch.int32),
        )
        per_layer: dict[str, Any] = {}
        for group in self.draft_attn_groups:
            per_layer.update(dict.fromkeys(group.layer_names, group.build_metadata(common)))
        return per_layer

    def _draft(self, batch: DraftBatch) -> torch.Tensor:
        """As the parent's, by replaying a captured loop where one fits."""
        shape = None
        num_requests = batch.attention.num_reqs
        if self.loop_graphs is not None and needs_temperature_alone(batch.sampling):
            shape = self.loop_graphs.shape_for(num_requests, batch.num_drafts)
        if shape is None:
            return super()._draft(batch)
        assert self.loop_graphs is not None
        assert self.loop_buffers is not None
        self.loop_buffers.load(
            next_token_ids_B=batch.next_token_ids,
            seq_lens_B=batch.attention.seq_lens,
            num_rejected_B=batch.num_rejected,
            block_table_BC=batch.attention.block_table_tensor,
            temperature_B=batch.sampling.temperature,
        )
        self.loop_graphs.replay(shape)
        probabilities_KBV = None
        if not batch.sampling.all_greedy:
            probabilities_KBV = self.loop_buffers.probabilities(shape, self._vocab_size)
        self._proposal = Proposal(list(self._runner.input_batch.req_ids), probabilities_KBV)
        # Cloned: vLLM copies them to the host on a stream of its own, maybe after the next replay.
        return self.loop_buffers.draft_token_ids(shape)[:num_requests].clone()
