"""Full CUDA graphs of the target for every draft length, which vLLM's V1 runner gives up.

vLLM captures full decode graphs for one query length, ``1 + num_speculative_tokens``. With a draft
length that changes at run time it falls back to piecewise graphs, one launch per layer part. Here
the dispatcher holds full graphs for several query lengths: 1 (nothing drafted) and 1 + K for every
K. Attention metadata is built per step outside the graph, as vLLM does for its one length.

Leans on (vLLM 0.32.0): ``VllmConfig._maybe_override_dynamic_sd_cudagraph_mode`` (the fallback),
``CompilationConfig.adjust_cudagraph_sizes_for_spec_decode`` (rounds all sizes to the one length),
``CudagraphDispatcher`` and its keys, ``GPUModelRunner._determine_batch_execution_and_padding`` and
``_warmup_and_capture``, ``GPUModelRunner.uniform_decode_query_len``, ``BatchDescriptor``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

MAX_DRAFTING_REQUESTS = 64
"""Full graphs with drafts are captured up to this many requests; larger batches run piecewise."""


def request_counts(
    capture_sizes: Iterable[int], query_len: int, *, max_num_seqs: int, max_num_tokens: int
) -> tuple[int, ...]:
    """Numbers of requests to capture for a query length, ascending.

    Args:
        capture_sizes: vLLM's capture sizes, read as numbers of requests.
        max_num_tokens: largest captured batch in tokens.

    Example: sizes 1, 2, 4, 8 with a query length of 5 and at most 20 tokens -> 1, 2, 4.
    """
    limit = max_num_seqs if query_len == 1 else min(max_num_seqs, MAX_DRAFTING_REQUESTS)
    limit = min(limit, max_num_tokens // query_len)
    return tuple(sorted(size for size in capture_sizes if size <= limit))


class MultiLengthCudagraphDispatcher(CudagraphDispatcher):
    """Dispatches uniform batches of several query lengths to full graphs."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._query_lens = tuple(range(1, 2 + vllm_config.num_speculative_tokens))
        self._request_counts: dict[int, tuple[int, ...]] = {}
        self.query_len = self.uniform_decode_query_len
        """Of the batch about to be dispatched; the runner's wrapper sets it."""

    def captures(self, query_len: int | None) -> bool:
        """Whether uniform batches of this query length have full graphs."""
        return query_len in self._request_counts

    def initialize_cudagraph_keys(
        self, cudagraph_mode: Any, uniform_decode_query_len: int = 1
    ) -> None:
        self._request_counts = {}
        decodes_full = (
            cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
            and cudagraph_mode.separate_routine()
            and self.vllm_config.lora_config is None
        )
        if not decodes_full:
            super().initialize_cudagraph_keys(cudagraph_mode, uniform_decode_query_len)
            return
        super().initialize_cudagraph_keys(cudagraph_mode.mixed_mode(), uniform_decode_query_len)
        self.cudagraph_mode = cudagraph_mode
        if cudagraph_mode.mixed_mode() == CUDAGraphMode.NONE:
            self._compute_bs_to_padded_graph_size()  # left out by the parent in that mode
        for query_len in self._query_lens:
            counts = request_counts(
                self.compilation_config.cudagraph_capture_sizes,
                query_len,
                max_num_seqs=self.vllm_config.scheduler_config.max_num_seqs,
                max_num_tokens=self.compilation_config.max_cudagraph_capture_size,
            )
            if counts:
                self._request_counts[query_len] = counts
            for count in counts:
                self.add_cudagraph_key(CUDAGraphMode.FULL, _descriptor(count, query_len))

    def dispatch(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        valid_modes: Any = None,
        invalid_modes: Any = None,
    ) -> tuple[Any, Any]:
        allowed = (valid_modes or CUDAGraphMode.valid_runtime_modes()) - (invalid_modes or set())
        if uniform_decode and CUDAGraphMode.FULL in allowed and self.captures(self.query_len):
            num_requests = num_tokens // self.query_len
            for count in self._request_counts[self.query_len]:
                descriptor = _descriptor(count, self.query_len)
                if count >= num_requests and descriptor in self.cudagraph_keys[CUDAGraphMode.FULL]:
                    return CUDAGraphMode.FULL, descriptor
        return super().dispatch(
            num_tokens=num_tokens,
            uniform_decode=uniform_decode and not self._request_counts,
            has_lora=has_lora,
            num_active_loras=num_active_loras,
            valid_modes=valid_modes,
            invalid_modes=invalid_modes,
        )


def _descriptor(num_requests: int, query_len: int) -> Any:
    return BatchDescriptor(num_tokens=num_requests * query_len, num_reqs=num_requests, uniform=True)


def keep_full_graphs(override: Any) -> Any:
    """Wrap ``VllmConfig._maybe_override_dynamic_sd_cudagraph_mode``: ours needs no fallback."""

    def wrapped(config: Any) -> None:
        if "slipstream" not in (config.additional_config or {}):
            override(config)

    return wrapped


def keep_capture_sizes(adjust: Any) -> Any:
    """Wrap ``CompilationConfig.adjust_cudagraph_sizes_for_spec_decode``: the dispatcher multiplies
    sizes by query lengths itself, and mixed batches keep sizes that fit them."""

    def wrapped(config: Any, uniform_decode_query_len: int) -> None:
        del config, uniform_decode_query_len

    return wrapped


def dispatch_by_query_length(determine: Any) -> Any:
    """Wrap ``GPUModelRunner._determine_batch_execution_and_padding``: any captured query length
    makes a uniform batch."""

    def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        dispatcher = runner.cudagraph_dispatcher
        query_len = kwargs.get("max_num_scheduled_tokens", args[3] if len(args) > 3 else None)
        if not isinstance(dispatcher, MultiLengthCudagraphDispatcher) or not dispatcher.captures(
            query_len
        ):
            return determine(runner, *args, **kwargs)
        saved = runner.uniform_decode_query_len
        runner.uniform_decode_query_len = dispatcher.query_len = query_len
        try:
            return determine(runner, *args, **kwargs)
        finally:
            runner.uniform_decode_query_len = saved

    return wrapped


def capture_each_query_length(warmup_and_capture: Any) -> Any:
    """Wrap ``GPUModelRunner._warmup_and_capture``: a uniform descriptor says its own length."""

    def wrapped(runner: Any, desc: Any, *args: Any, **kwargs: Any) -> Any:
        if not desc.uniform or not desc.num_reqs:
            return warmup_and_capture(runner, desc, *args, **kwargs)
        saved = runner.uniform_decode_query_len
        runner.uniform_decode_query_len = desc.num_tokens // desc.num_reqs
        try:
            return warmup_and_capture(runner, desc, *args, **kwargs)
        finally:
            runner.uniform_decode_query_len = saved

    return wrapped


def capture_draft_loops_too(capture_model: Any) -> Any:
    """Wrap ``GPUModelRunner.capture_model``: the drafter's loops are captured in the same phase.

    Before the target's graphs, because the end of vLLM's own capture locks its workspaces.
    """

    def wrapped(runner: Any) -> Any:
        drafter: Any = getattr(runner, "drafter", None)
        if hasattr(drafter, "capture_draft_loops"):
            drafter.capture_draft_loops()
        return capture_model(runner)

    return wrapped


def apply_cuda_patches() -> None:
    """Everything the plugin changes in vLLM on CUDA only."""
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.v1.worker import gpu_model_runner

    from rollout_server.drafter.cuda_proposer import GraphedSelfDraftProposer

    gpu_model_runner.DraftModelProposer = GraphedSelfDraftProposer
    gpu_model_runner.CudagraphDispatcher = MultiLengthCudagraphDispatcher
    runner = gpu_model_runner.GPUModelRunner
    runner._determine_batch_execution_and_padding = dispatch_by_query_length(
        runner._determine_batch_execution_and_padding
    )
    runner._warmup_and_capture = capture_each_query_length(runner._warmup_and_capture)
    runner.capture_model = capture_draft_loops_too(runner.capture_model)
    VllmConfig._maybe_override_dynamic_sd_cudagraph_mode = keep_full_graphs(
        VllmConfig._maybe_override_dynamic_sd_cudagraph_mode
    )
    CompilationConfig.adjust_cudagraph_sizes_for_spec_decode = keep_capture_sizes(
        CompilationConfig.adjust_cudagraph_sizes_for_spec_decode
    )
