"""The policy model and the rollout engines that serve it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from shared.config.autoscaling import AutoscalingConfig
from shared.config.base import SettingsModel
from shared.config.pools import DEFAULT_POOL, OVERRIDES, PlacementConfig, PoolConfig
from shared.types import DrafterRebuild, DrafterScheme


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
    """Ray CPUs an engine reserves; 0 leaves the choice of cores to ``cpu_cores``."""
    num_gpus: float | None = Field(default=None, ge=0.0)
    """Ray GPUs an engine reserves, all on one node; absent: one per rank on ``cuda``, none on
    ``cpu``. A fraction lets engines of one rank share a GPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks of an engine; each needs a GPU on ``cuda``."""
    placement: PlacementConfig = PlacementConfig()
    pools: list[PoolConfig] = Field(default_factory=list)
    """Engines of several kinds; replaces ``count`` and ``max_count``. Empty: one pool,
    ``default``."""
    autoscaling: AutoscalingConfig = AutoscalingConfig()
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
    load_ahead_mib: int = Field(default=0, ge=0)
    """Memory (on a GPU, beside ``gpu_memory_utilization``) in which each rank makes a push's
    weights ready while it still generates with the old ones; what does not fit is loaded while it
    stands still. A shorter pause for a longer push."""
    seed: int = 0
    """vLLM's, for requests without a seed of their own."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long an engine may take to load and be ready."""
    generate_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest a group may take on an engine before it is aborted."""
    drain_timeout_s: float = Field(default=120.0, gt=0)
    """How long an engine that goes may finish what it has."""
    node_poll_s: float = Field(default=2.0, gt=0)
    """How often Ray is asked which nodes it is about to lose; engines on them are drained and
    replaced elsewhere."""
    placement_timeout_s: float = Field(default=300.0, gt=0)
    """How long an engine may wait for a node with room, one that an autoscaling cluster still has
    to start included."""
    status_timeout_s: float = Field(default=8.0, gt=0, le=30.0)
    """How long an engine may take to answer for its load. It answers between two steps."""
    max_status_timeouts: int = Field(default=3, ge=1)
    """So many in a row, and the engine is given up and replaced."""
    frozen_timeout_s: float | None = Field(default=None, ge=1.0)
    """An engine that owes an answer while none of its processes does anything for so long is given
    up and replaced. Absent: 3 on `cpu`, where every step takes processor time; on `cuda`
    `status_timeout_s` times `max_status_timeouts`: processes may sleep while a GPU computes."""
    progress_timeout_s: float = Field(default=120.0, gt=0)
    """An engine that holds work and makes no token for so long is given up and replaced. Longer
    than its slowest step."""
    restart_backoff_s: float = Field(default=1.0, gt=0)
    """Wait before an engine is replaced; doubled for each further failure until one serves."""
    restart_max_backoff_s: float = Field(default=60.0, gt=0)
    """Longest of those waits."""
    restart_budget: int = Field(default=5, ge=0)
    """Engines a pool may lose in ``restart_window_s`` for each one asked for. One more, and it
    replaces none until ``PUT /v1/engines``."""
    restart_window_s: float = Field(default=600.0, gt=0)
    """Losses older than this no longer count."""
    vllm_args: dict[str, JsonValue] = Field(default_factory=dict)
    """More ``vllm.AsyncEngineArgs``, by vLLM's names. What slipstream sets itself is refused."""

    @property
    def all_pools(self) -> tuple[PoolConfig, ...]:
        """At least one; ``count`` and ``max_count`` are theirs."""
        default = PoolConfig(name=DEFAULT_POOL, count=self.count, max_count=self.max_count)
        return tuple(self.pools) or (default,)

    @property
    def total_count(self) -> int:
        """Engines that are started with the server."""
        return sum(pool.count for pool in self.all_pools)

    def of_pool(self, pool: PoolConfig) -> EngineConfig:
        """The settings of one pool's engines."""
        own = {name: value for name in OVERRIDES if (value := getattr(pool, name)) is not None}
        return self.model_copy(update={**own, "pools": []})

    @model_validator(mode="after")
    def count_within_max(self) -> Self:
        if self.count > self.max_count:
            raise ValueError(
                f"engine.count {self.count} is above engine.max_count {self.max_count}"
            )
        return self

    @model_validator(mode="after")
    def pools_have_counts_and_names_of_their_own(self) -> Self:
        names = [pool.name for pool in self.pools]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"engine.pools has the name {doubled[0]} twice")
        left = sorted({"count", "max_count"} & self.model_fields_set) if self.pools else []
        if left:
            raise ValueError(
                f"engine.{left[0]} is for a configuration without engine.pools: "
                f"set {left[0]} of each pool"
            )
        return self

    @model_validator(mode="after")
    def gpus_are_enough_for_the_ranks(self) -> Self:
        for pool in self.all_pools:
            own = self.of_pool(pool)
            num_gpus, num_ranks = own.num_gpus, own.tensor_parallel_size
            if num_gpus is None or own.device == "cpu":
                continue
            if num_gpus > 1 and num_gpus != int(num_gpus):
                raise ValueError(
                    f"num_gpus {num_gpus:g} (engine pool {pool.name}): above 1, Ray gives whole "
                    "GPUs only"
                )
            if 0 < num_gpus < num_ranks and num_ranks > 1:
                raise ValueError(
                    f"num_gpus {num_gpus:g} (engine pool {pool.name}) is below "
                    f"tensor_parallel_size {num_ranks}: each rank needs a GPU"
                )
        return self

    @model_validator(mode="after")
    def autoscaling_has_a_pool_within_its_limits(self) -> Self:
        scaling = self.autoscaling
        if not scaling.enabled and scaling.pool is None:
            return self
        pools = {pool.name: pool for pool in self.all_pools}
        name = scaling.pool or (next(iter(pools)) if len(pools) == 1 else None)
        if name not in pools:
            raise ValueError(
                f"engine.autoscaling.pool {scaling.pool!r} is none of the engine pools "
                f"{', '.join(pools)}"
            )
        largest = pools[name].max_count
        if scaling.enabled and max(scaling.min_count, scaling.max_count or 0) > largest:
            raise ValueError(
                f"engine.autoscaling.min_count {scaling.min_count} and max_count "
                f"{scaling.max_count} must not be above max_count {largest} of engine pool {name}"
            )
        return self

    @model_validator(mode="after")
    def backoff_in_order(self) -> Self:
        if self.restart_backoff_s > self.restart_max_backoff_s:
            raise ValueError(
                f"engine.restart_backoff_s {self.restart_backoff_s:g} is above "
                f"engine.restart_max_backoff_s {self.restart_max_backoff_s:g}"
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
    it is rebuilt less often and samples keep their distribution; drafts may be accepted less
    often."""
    rebuild: DrafterRebuild = DrafterRebuild.BETWEEN_STEPS
    """When the drafter is made anew after a push: ``between_steps`` lets generation go on, without
    drafts until it is done; ``in_pause`` makes the pause of a push longer."""
    quantize_lm_head: bool = True
    """Quantize the LM head too; False shares the target's."""
    exclude: list[str] = Field(default_factory=list)
    """Regular expressions of module names whose linear layers stay unquantized."""
