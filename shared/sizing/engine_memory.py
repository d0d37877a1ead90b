"""What one engine puts on each of its GPUs, and how many sequences are left room for. Pure.

An estimate before a GPU is there. vLLM measures what is really left when it starts; the server's
log has the figure ("KV blocks").
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.config.engine import DrafterConfig
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from shared.sizing.model_shape import LinearLayer, ModelShape
from shared.types import DrafterScheme

MIB = 1 << 20
GIB = 1 << 30
DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
CONTEXT_BYTES = 2 * GIB
"""CUDA context, NCCL's buffers and CUDA graphs of one GPU. Assumed, not measured."""
LOGITS_BYTES = 14
"""A logit in bfloat16, and three float32 copies of it: scaled, sorted, as probabilities. Assumed
from what the sampler does."""
SCALE_BYTES_INT4 = 2
ZERO_POINT_BYTES_INT4 = 0.5
SCALE_BYTES_PER_CHANNEL = 4
TRAINER_BYTES_PER_PARAMETER = 16
"""float32 weights, their gradients and Adam's two moments (``trainer/policy.py``)."""
VERSIONS_IN_SHARED_MEMORY = 2
"""The committed one is kept until the next is committed (``docs/weights.md``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """Bytes on each GPU of an engine."""

    budget_bytes: int
    """What vLLM may take: ``engine.gpu_memory_utilization`` of the GPU."""
    target_bytes: int
    drafter_bytes: int
    work_bytes: int
    """Activations of the largest step, and the logits of a verification."""
    context_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int

    @property
    def num_kv_tokens(self) -> int:
        """Tokens the engine's KV cache holds; every rank holds its share of each."""
        return self.kv_bytes // self.kv_bytes_per_token

    def num_sequences(self, num_tokens: int) -> int:
        """Sequences of a length, prompt included, that fit at once."""
        return self.num_kv_tokens // num_tokens


def plan_engine_memory(shape: ModelShape, config: RunConfig, gpu_memory_bytes: int) -> EngineMemory:
    """Divide a GPU between target, drafter, work space and KV cache.

    Args:
        gpu_memory_bytes: of one GPU, as ``nvidia-smi`` has it.

    Raises:
        ConfigurationError: nothing is left for the KV cache.
    """
    engine, ranks = config.engine, config.engine.tensor_parallel_size
    value_bytes = DTYPE_BYTES[config.model.dtype]
    budget = int(gpu_memory_bytes * engine.gpu_memory_utilization)
    target = shape.num_parameters * value_bytes // ranks
    drafter = num_drafter_bytes(shape, config.drafter, value_bytes) // ranks
    work = num_work_bytes(shape, config, value_bytes)
    left = budget - target - drafter - work - CONTEXT_BYTES
    if engine.kv_cache_memory_mib is not None:
        left = min(left, engine.kv_cache_memory_mib * MIB)
    per_token = kv_bytes_per_token(shape, value_bytes, ranks)
    if left < per_token:
        raise ConfigurationError(
            f"a GPU of {gpu_memory_bytes / GIB:.1f} GiB has no room for a KV cache: "
            f"engine.gpu_memory_utilization {engine.gpu_memory_utilization} of it are "
            f"{budget / GIB:.1f} GiB, target {target / GIB:.1f}, drafter {drafter / GIB:.1f} and "
            f"work space {(work + CONTEXT_BYTES) / GIB:.1f} GiB; raise "
            f"engine.tensor_parallel_size {ranks}, or lower engine.max_num_batched_tokens "
            f"{engine.max_num_batched_tokens} and engine.max_num_seqs {engine.max_num_seqs}",
            param="engine.tensor_parallel_size",
        )
    return EngineMemory(
        budget_bytes=budget,
        target_bytes=target,
        drafter_bytes=drafter,
        work_bytes=work,
        context_bytes=CONTEXT_BYTES,
        kv_bytes=left,
        kv_bytes_per_token=per_token,
    )


def kv_bytes_per_token(shape: ModelShape, value_bytes: int, num_ranks: int = 1) -> int:
    """Keys and values of one token on one rank. The drafter has no cache of its own."""
    heads = max(1, shape.num_kv_heads // num_ranks)  # more ranks than heads: each has a copy
    return 2 * shape.num_layers * heads * shape.head_dim * value_bytes


def num_drafter_bytes(shape: ModelShape, drafter: DrafterConfig, value_bytes: int) -> int:
    """Quantized linear layers with their scales; everything else is the target's own."""
    if not drafter.enabled:
        return 0
    scheme = DrafterScheme.INT4 if drafter.scheme is DrafterScheme.AUTO else drafter.scheme
    linears = [*shape.layer_linears * shape.num_layers]
    if drafter.quantize_lm_head:
        linears.append(shape.lm_head)
    return sum(_linear_bytes(linear, scheme, drafter, value_bytes) for linear in linears)


def _linear_bytes(
    linear: LinearLayer, scheme: DrafterScheme, drafter: DrafterConfig, value_bytes: int
) -> int:
    if scheme is DrafterScheme.NONE:
        return linear.num_weights * value_bytes
    if scheme is not DrafterScheme.INT4:
        return linear.num_weights + linear.num_outputs * SCALE_BYTES_PER_CHANNEL
    per_group = SCALE_BYTES_INT4 + (0.0 if drafter.int4_symmetric else ZERO_POINT_BYTES_INT4)
    num_groups = linear.num_weights // drafter.int4_group_size
    return linear.num_weights // 2 + int(num_groups * per_group)


def num_work_bytes(shape: ModelShape, config: RunConfig, value_bytes: int) -> int:
    """Of one GPU: a step's widest layer, and logits of every row that is sampled or verified."""
    engine = config.engine
    num_drafts = config.speculation.reserved_speculative_tokens if config.drafter.enabled else 0
    # gate and up, their product, and the hidden state a few times over
    width = 3 * shape.intermediate_size // engine.tensor_parallel_size + 4 * shape.hidden_size
    activations = engine.max_num_batched_tokens * width * value_bytes
    num_rows = engine.max_num_seqs * (num_drafts + 1)
    return activations + num_rows * shape.vocab_size * LOGITS_BYTES


def num_push_bytes(shape: ModelShape, value_bytes: int) -> int:
    """Room a weight push needs in shared memory on each node, at its fullest moment."""
    return VERSIONS_IN_SHARED_MEMORY * shape.num_parameters * value_bytes


def num_trainer_bytes(shape: ModelShape) -> int:
    """What this project's trainer holds before the first activation, over all of its ranks."""
    return shape.num_parameters * TRAINER_BYTES_PER_PARAMETER
