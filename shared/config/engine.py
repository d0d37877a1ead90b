"""The policy model and the rollout engines that serve it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from shared.config.base import SettingsModel
from shared.types import DrafterScheme


class ModelConfig(SettingsModel):
    """Which policy is served and trained."""

    path: str
    """A Hugging Face causal-LM directory (or hub name, where a hub can be reached)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the served weights; ``auto`` is what the model directory says."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt + completion in tokens; the model's own limit when absent."""
    trust_remote_code: bool = False
    """Run Python code of the model directory, as the engine's user."""


class EngineConfig(SettingsModel):
    """How many engines there are and what each of them gets."""

    count: int = Field(default=1, ge=0)
    """Engines at the start; ``PUT /v1/engines`` changes it."""
    max_count: int = Field(default=64, ge=1)
    """Highest count ``PUT /v1/engines`` accepts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: what the installed vLLM was built for."""
    cpu_cores: list[str] = Field(default_factory=list)
    """Cores per engine in vLLM's notation (``"0-3"``; ``"0|1"`` for two TP ranks), used in turn by
    engine index. Empty: all cores for every engine. Engines on the same cores starve each other."""
    num_cpus: float = Field(default=0.0, ge=0.0)
    """Ray CPUs an engine actor reserves (``cpu`` device); 0 leaves placement to ``cpu_cores``."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Also the GPUs an engine reserves on ``cuda``."""
    kv_cache_memory_mib: int | None = Field(default=None, ge=1)
    """KV-cache budget per engine. Needed on CPU; on CUDA absent means vLLM's own sizing."""
    num_kv_blocks: int | None = Field(default=None, ge=4)
    """Exact number of KV blocks instead, for tests and demos."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that vLLM may fill (``cuda``)."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens of a KV block; vLLM's choice when absent. On CPU a multiple of 32."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences an engine runs at once."""
    max_num_batched_tokens: int = Field(default=2048, ge=16)
    """Tokens an engine processes per step (chunked prefill)."""
    enforce_eager: bool = True
    """True captures no CUDA graphs: a faster start and slower steps."""
    enable_prefix_caching: bool = True
    """Prompts that begin alike share KV blocks, within a weight version."""
    seed: int = 0
    """vLLM's, for requests without a seed of their own."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long an engine may take to load and be ready."""
    generate_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest a group may take on an engine before it is aborted."""
    drain_timeout_s: float = Field(default=120.0, gt=0)
    """How long an engine that goes may finish what it has."""
    vllm_args: dict[str, JsonValue] = Field(default_factory=dict)
    """More ``vllm.AsyncEngineArgs``, by vLLM's names. What slipstream sets itself is refused."""

    @model_validator(mode="after")
    def count_within_max(self) -> Self:
        if self.count > self.max_count:
            raise ValueError(
                f"engine.count {self.count} is above engine.max_count {self.max_count}"
            )
        return self

    @model_validator(mode="after")
    def vllm_args_leave_ours_alone(self) -> Self:
        taken = sorted(set(self.vllm_args) & RESERVED_VLLM_ARGS)
        if taken:
            raise ValueError(
                f"engine.vllm_args may not set {', '.join(taken)}: "
                "slipstream sets these from its own settings"
            )
        return self


RESERVED_VLLM_ARGS = frozenset(
    {
        "model",
        "tokenizer",
        "dtype",
        "max_model_len",
        "trust_remote_code",
        "speculative_config",
        "spec_method",
        "spec_model",
        "spec_tokens",
        "per_request_spec_decode_metrics",
        "scheduler_cls",
        "async_scheduling",
        "worker_extension_cls",
        "disable_hybrid_kv_cache_manager",
        "disable_log_stats",
        "weight_transfer_config",
        "logprobs_mode",
        "tensor_parallel_size",
        "kv_cache_memory_bytes",
        "num_gpu_blocks_override",
        "gpu_memory_utilization",
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "enable_prefix_caching",
        "seed",
        "additional_config",
    }
)


class DrafterConfig(SettingsModel):
    """The quantized copy of the policy that drafts."""

    enabled: bool = True
    """False starts engines without any drafter (they can never speculate)."""
    scheme: DrafterScheme = DrafterScheme.AUTO
    """How the copy is quantized."""
    int4_group_size: Literal[32, 64, 128] = 128
    """Input channels that share a scale (scheme ``int4``)."""
    int4_symmetric: bool = True
    """Scheme ``int4``: False gives each group a zero point of its own."""
    requantize_every: int = Field(default=1, ge=1, le=1000)
    """Rebuild the drafter when it would be this many versions behind. 1: at every push. With more,
    commits are shorter and samples keep their distribution; drafts may be accepted less often."""
    quantize_lm_head: bool = True
    """Quantize the LM head too; False shares the target's."""
    exclude: list[str] = Field(default_factory=list)
    """Regular expressions of module names whose linear layers stay unquantized."""
