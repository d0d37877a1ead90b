"""The tables of ``docs/sizing.md``. ``python -m shared.sizing`` writes them; a test compares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shared.config.engine import DrafterConfig
from shared.config.loading import load_run_config
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from shared.sizing.engine_memory import (
    GIB,
    MIB,
    EngineMemory,
    kv_bytes_per_token,
    num_drafter_bytes,
    num_push_bytes,
    num_trainer_bytes,
    plan_engine_memory,
)
from shared.sizing.model_shape import ModelShape
from shared.types import DrafterScheme

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "sizing.md"
PRESETS = ROOT / "deploy" / "configs"
MODELS = {
    "Qwen/Qwen2.5-1.5B-Instruct": ModelShape(
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        vocab_size=151936,
        has_tied_embeddings=True,
        has_qkv_bias=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": ModelShape(
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        has_qkv_bias=True,
    ),
    "Qwen/Qwen2.5-14B-Instruct": ModelShape(
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=152064,
        has_qkv_bias=True,
    ),
    "Qwen/Qwen2.5-32B-Instruct": ModelShape(
        hidden_size=5120,
        intermediate_size=27648,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=152064,
        has_qkv_bias=True,
    ),
}
"""As their ``config.json`` on the hub has them."""
GPU_MEMORY_MIB = {"48 GB": 46068, "80 GB": 81559, "141 GB": 143771}
"""What ``nvidia-smi`` calls the total of an L40S, an H100 and an H200."""
GPU_OF_THE_PRESETS = "80 GB"
TENSOR_PARALLEL_SIZES = (1, 2, 4)
SEQUENCE_LENGTHS = (4096, 16384)
BFLOAT16_BYTES = 2
MARKED = re.compile(r"(<!-- sizing:(\w+) -->\n).*?(<!-- /sizing:\2 -->)", re.DOTALL)


def gpu_memory_bytes(gpu: str) -> int:
    return GPU_MEMORY_MIB[gpu] * MIB


def models_table() -> str:
    """What a model weighs, wherever it is served."""
    head = [
        "model",
        "parameters",
        "weights, bf16",
        "drafter, int4",
        "drafter, int8",
        "KV per token",
        "push, shared memory",
        "trainer, float32",
    ]
    rows = []
    for name, shape in MODELS.items():
        int4, int8 = (
            num_drafter_bytes(shape, DrafterConfig(scheme=scheme), BFLOAT16_BYTES)
            for scheme in (DrafterScheme.INT4, DrafterScheme.INT8)
        )
        rows.append(
            [
                short_name(name),
                f"{shape.num_parameters / 1e9:.2f} billion",
                _gib(shape.num_parameters * BFLOAT16_BYTES),
                _gib(int4),
                _gib(int8),
                f"{kv_bytes_per_token(shape, BFLOAT16_BYTES) // 1024} KiB",
                _gib(num_push_bytes(shape, BFLOAT16_BYTES)),
                _gib(num_trainer_bytes(shape)),
            ]
        )
    return _markdown(head, rows)


def engines_table() -> str:
    """Per model and GPU the fewest ranks that hold a long sequence, and twice as many."""
    rows = []
    for name, shape in MODELS.items():
        for gpu in GPU_MEMORY_MIB:
            fitting = [
                (ranks, memory)
                for ranks in TENSOR_PARALLEL_SIZES
                if (memory := _memory_or_none(shape, _common_settings(name, ranks), gpu))
                is not None
            ]
            for ranks, memory in fitting[:2]:
                rows.append([short_name(name), f"{ranks} of {gpu}", *_engine_cells(memory)])
    return _markdown(["model", "GPUs", *_engine_head()], rows)


def _memory_or_none(shape: ModelShape, config: RunConfig, gpu: str) -> EngineMemory | None:
    try:
        memory = plan_engine_memory(shape, config, gpu_memory_bytes(gpu))
    except ConfigurationError:
        return None
    return memory if memory.num_sequences(max(SEQUENCE_LENGTHS)) else None


def presets_table() -> str:
    """The CUDA presets as they stand, on GPUs of 80 GB."""
    rows = []
    for path, config in cuda_presets():
        memory = preset_memory(config)
        gpus = f"{config.engine.count} x {config.engine.tensor_parallel_size}"
        gate = int(memory.num_kv_tokens * config.speculation.kv_cache_threshold)
        rows.append([f"`{path.stem}`", gpus, *_engine_cells(memory), f"{gate:,}"])
    return _markdown(["preset", "GPUs", *_engine_head(), "tokens at the KV gate"], rows)


def cuda_presets() -> Iterable[tuple[Path, RunConfig]]:
    for path in sorted(PRESETS.glob("*.yaml")):
        config = load_run_config(path, environment={})
        if config.engine.device == "cuda":
            yield path, config


def preset_memory(config: RunConfig) -> EngineMemory:
    shape = MODELS[config.model.path]
    return plan_engine_memory(shape, config, gpu_memory_bytes(GPU_OF_THE_PRESETS))


TABLES: dict[str, Callable[[], str]] = {
    "models": models_table,
    "engines": engines_table,
    "presets": presets_table,
}


def with_tables(page: str) -> str:
    """The page with its tables as they are now."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def short_name(model: str) -> str:
    return model.rpartition("/")[2].removesuffix("-Instruct")


def _common_settings(model: str, ranks: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": model, "dtype": "bfloat16"},
            "engine": {
                "device": "cuda",
                "tensor_parallel_size": ranks,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 256,
                "max_num_batched_tokens": 8192,
            },
            "speculation": {"num_speculative_tokens": 4},
        }
    )


def _engine_head() -> list[str]:
    lengths = [f"sequences of {length:,}" for length in SEQUENCE_LENGTHS]
    return ["target", "drafter", "work", "KV cache", "KV tokens", *lengths]


def _engine_cells(memory: EngineMemory) -> list[str]:
    return [
        _gib(memory.target_bytes),
        _gib(memory.drafter_bytes),
        _gib(memory.work_bytes + memory.context_bytes),
        _gib(memory.kv_bytes),
        f"{memory.num_kv_tokens:,}",
        *(f"{memory.num_sequences(length):,}" for length in SEQUENCE_LENGTHS),
    ]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
