"""From our configuration to vLLM's arguments and an engine process's environment. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_server.engine.vllm_plugin.settings import PluginSettings, to_additional_config
from rollout_server.speculation.calibration import SelfCalibration
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.pools import DEFAULT_POOL
from shared.config.speculation import SpeculationConfig

MIB = 1024 * 1024
DEFAULT_CPU_KV_CACHE_MIB = 1024
SCHEDULER_CLASSES = {
    # vLLM switches asynchronous scheduling off on CPU.
    "cpu": "rollout_server.speculation.scheduler.SlipstreamScheduler",
    "cuda": "rollout_server.speculation.scheduler.SlipstreamAsyncScheduler",
}
WORKER_EXTENSION_CLASS = (
    "rollout_server.engine.vllm_plugin.worker_extension.SlipstreamWorkerExtension"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """Everything an engine actor needs to start; travels to the actor's process."""

    engine_id: str
    index: int
    model: ModelConfig
    engine: EngineConfig
    drafter: DrafterConfig
    speculation: SpeculationConfig
    device: str
    """``cpu`` or ``cuda``, after ``auto`` is resolved."""
    pool: str = DEFAULT_POOL
    calibrations: tuple[SelfCalibration, ...] = ()
    """Measured by earlier engines of the pool; used by one that has no file and would measure."""

    @property
    def cpu_cores(self) -> str | None:
        """Cores this engine is bound to, in vLLM's notation."""
        cores = self.engine.cpu_cores
        return cores[self.index % len(cores)] if cores and self.device == "cpu" else None


def vllm_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Keyword arguments of ``vllm.AsyncEngineArgs`` (vLLM 0.32.0)."""
    engine = spec.engine
    plugin = PluginSettings(
        engine_id=spec.engine_id, drafter=spec.drafter, speculation=spec.speculation
    )
    arguments: dict[str, Any] = {
        **engine.vllm_args,
        "model": spec.model.path,
        "dtype": spec.model.dtype,
        "trust_remote_code": spec.model.trust_remote_code,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "seed": engine.seed,
        "scheduler_cls": SCHEDULER_CLASSES[spec.device],
        "worker_extension_cls": WORKER_EXTENSION_CLASS,
        "additional_config": to_additional_config(plugin),
        # Logprobs after temperature, top-p and top-k: those of the behaviour policy.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": False,
    }
    if spec.model.max_model_len is not None:
        arguments["max_model_len"] = spec.model.max_model_len
    if engine.block_size is not None:
        arguments["block_size"] = engine.block_size
    arguments.update(_kv_cache_arguments(spec))
    if engine.tensor_parallel_size > 1:
        # Inside a placement group vLLM would place its ranks with Ray, where no GPU is left for
        # them: the engine actor has them all.
        arguments.setdefault("distributed_executor_backend", "mp")
    if spec.drafter.enabled:
        length = spec.speculation.reserved_speculative_tokens
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": spec.model.path,
            "num_speculative_tokens": length,
            # Greedy drafting, the default, collapses acceptance at temperature 1.
            "draft_sample_method": "probabilistic",
            "draft_tensor_parallel_size": engine.tensor_parallel_size,
            # Switches vLLM's per-step draft length on; our scheduler replaces the table itself.
            "num_speculative_tokens_per_batch_size": [[1, engine.max_num_seqs, length]],
        }
        arguments["per_request_spec_decode_metrics"] = "summary"
        # One block table for all layers: the draft loop follows one. Costs models that mix sliding
        # windows with full attention (Gemma 2, 3) the KV memory a window would save.
        arguments["disable_hybrid_kv_cache_manager"] = True
    return arguments


def _kv_cache_arguments(spec: EngineSpec) -> dict[str, Any]:
    engine = spec.engine
    arguments: dict[str, Any] = {}
    mib = engine.kv_cache_memory_mib
    if mib is None and spec.device == "cpu":
        # Without an explicit budget vLLM would take a share of the machine's memory.
        mib = DEFAULT_CPU_KV_CACHE_MIB
    if mib is not None:
        arguments["kv_cache_memory_bytes"] = mib * MIB
    if mib is None or spec.device == "cuda":
        # On CUDA vLLM refuses to start with less free memory than this, whatever the KV budget.
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    if engine.num_kv_blocks is not None:
        arguments["num_gpu_blocks_override"] = engine.num_kv_blocks
    return arguments


def engine_environment(spec: EngineSpec, prefix: Path | None = None) -> dict[str, str]:
    """Environment variables of the actor's process, inherited by vLLM's own processes.

    Args:
        prefix: root of the Python environment, where ``intel-openmp`` puts its library.
    """
    environment = {
        # The proposer hook lives in the V1 model runner, the only one on CPU.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if Path(spec.model.path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if spec.device == "cpu":
        library = (prefix or Path(sys.prefix)) / "lib" / "libiomp5.so"
        if library.is_file():
            # Speculative decoding on CPU is slow with any other OpenMP runtime.
            environment["LD_PRELOAD"] = str(library)
        if spec.cpu_cores is not None:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = spec.cpu_cores
        else:
            # Left to itself, vLLM keeps one core for others: half of a machine with two.
            environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return environment
