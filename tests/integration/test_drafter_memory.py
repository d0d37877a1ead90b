"""What a drafter costs in memory: its quantized weights, no KV cache, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollout_server.drafter.kernels.base import LayerShape
from rollout_server.drafter.kernels.factory import make_draft_kernel
from rollout_server.drafter.plan import DeviceAbilities, DrafterPlan
from rollout_server.engine.facts import EngineFacts
from shared.config.engine import DrafterConfig
from shared.types import DrafterScheme
from tests.support.engine import started_engine
from tests.support.models import make_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ENGINE = {"num_kv_blocks": None, "kv_cache_memory_mib": 24, "max_num_seqs": 8}
VOCAB_PADDING = 64
"""vLLM pads the LM head's rows to a multiple of this."""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, with layers wide enough that scales weigh what they do in a real model."""
    return make_model(
        tmp_path_factory.mktemp("wide"),
        seed=0,
        dtype=torch.bfloat16,
        weight_std=0.05,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
    )


def linear_shapes(model: Path) -> list[tuple[int, int]]:
    """``(outputs, inputs)`` of every linear layer and the LM head as the engine pads it."""
    weights = load_file(model / "model.safetensors")
    shapes = [tuple(w.shape) for name, w in weights.items() if name.endswith("proj.weight")]
    vocab_size, hidden_size = weights["model.embed_tokens.weight"].shape
    padded = -(-vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    return [*((n, k) for n, k in shapes), (padded, hidden_size)]


def int4_bytes(num_outputs: int, num_inputs: int) -> int:
    """What this CPU's int4 kernel holds for one layer."""
    plan = DrafterPlan.from_config(
        DrafterConfig(scheme=DrafterScheme.INT4), DeviceAbilities(device_type="cpu")
    )
    shape = LayerShape(num_outputs=num_outputs, num_inputs=num_inputs, dtype=torch.bfloat16)
    kernel = make_draft_kernel(plan, shape, "cpu")
    kernel.pack(torch.randn(num_outputs, num_inputs))
    return kernel.matmul.num_bytes()


async def facts_of(model: Path, drafter: dict[str, Any]) -> EngineFacts:
    async with started_engine(model, engine=ENGINE, drafter=drafter, dtype="bfloat16") as (
        _,
        facts,
    ):
        return facts


async def test_a_drafter_costs_its_packed_weights_and_not_one_kv_block(wide_model: Path) -> None:
    shapes = linear_shapes(wide_model)
    num_weights = sum(n * k for n, k in shapes)
    without = await facts_of(wide_model, {"enabled": False})
    int8 = await facts_of(wide_model, {"scheme": "int8"})
    int4 = await facts_of(wide_model, {"scheme": "int4"})

    assert without.num_kv_blocks > 0
    assert without.drafter_bytes == 0
    assert int8.num_kv_blocks == without.num_kv_blocks
    assert int4.num_kv_blocks == without.num_kv_blocks

    # To the byte: embeddings, norms and rotary tables are the target's own tensors.
    assert int8.drafter_bytes == num_weights + sum(8 * n for n, _ in shapes)
    assert int4.drafter_bytes == sum(int4_bytes(n, k) for n, k in shapes)
    assert int8.drafter_bytes <= 0.52 * 2 * num_weights
    assert int4.drafter_bytes <= 0.29 * 2 * num_weights
