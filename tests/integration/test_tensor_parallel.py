"""Two tensor-parallel ranks on CPU: each holds, drafts with and requantizes its own shards."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from tests.support.architectures import GEMMA3, QWEN2, Architecture
from tests.support.engine import (
    acceptance,
    drafter_memory,
    generate,
    greedy,
    push,
    running_engine,
    speculate,
)
from tests.support.models import greedy_reference, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROOF = os.environ.get("PROOF") == "1"
# Tied embeddings and biases; in the long form also sliding windows.
MODELS = (QWEN2, GEMMA3) if PROOF else (QWEN2,)
TWO_RANKS = {"tensor_parallel_size": 2, "cpu_cores": ["0|1"]}
NUM_TOKENS = 32
PADDED_VOCAB_SIZE = 64
"""vLLM makes vocabularies multiples of this."""
PROMPTS = random_prompts(10, seed=6)
SAMPLING = SamplingOptions(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MODELS, ids=lambda a: a.name)
async def two_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[EngineActor, Architecture, Path]]:
    """An engine of two ranks; its processes must be gone when it is shut down."""
    architecture = request.param
    model = architecture(tmp_path_factory.mktemp("two-ranks"), seed=0)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    async with running_engine(model, engine=TWO_RANKS, drafter={"scheme": "int8"}) as engine:
        children = psutil.Process().children(recursive=True)
        started = [
            child
            for child in children
            # Python's own tracker of shared memory lives as long as this process.
            if child.pid not in before and "resource_tracker" not in " ".join(child.cmdline())
        ]
        assert len(started) >= 3, "an engine core and two workers"
        yield engine, architecture, model
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []


async def test_two_ranks_say_what_hugging_face_says_and_after_a_push_again(
    two_ranks: tuple[EngineActor, Architecture, Path], tmp_path: Path
) -> None:
    engine, architecture, old_model = two_ranks
    new_model = architecture(tmp_path / "new", seed=77)
    for model, version in ((old_model, 0), (new_model, 1)):
        if version:
            await push(engine, model, version, tmp_path)
        expected = greedy_reference(model, PROMPTS, NUM_TOKENS)
        for num_speculative_tokens in (0, 3):
            await speculate(engine, num_speculative_tokens)
            name = f"v{version}-k{num_speculative_tokens}"
            samples = await generate(engine, PROMPTS, greedy(NUM_TOKENS), name=name)
            assert [group[0].token_ids for group in samples] == expected, name
        async with acceptance(engine) as counts:
            await generate(engine, PROMPTS, SAMPLING, n=2, name=f"v{version}")
        assert counts.rate > 0.75


async def test_the_ranks_hold_one_drafter_between_them(
    two_ranks: tuple[EngineActor, Architecture, Path],
) -> None:
    ranks = await drafter_memory(two_ranks[0])
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    # Sharded int8 values: half on each rank. Scales of row-parallel layers are on both, and some
    # kernels keep a compensation term of the same size beside each scale.
    values, scales = whole_int8_drafter_bytes(two_ranks[1])
    total = sum(rank["drafter_bytes"] for rank in ranks)
    assert values + scales <= total <= values + 4 * scales


def whole_int8_drafter_bytes(architecture: Architecture) -> tuple[int, int]:
    """int8 values and float32 scales per output channel of all linear layers and the LM head."""
    config = architecture.config()
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    hidden, middle = config.hidden_size, config.intermediate_size
    layers = [(query + 2 * key, hidden), (hidden, query), (2 * middle, hidden), (hidden, middle)]
    layers = layers * config.num_hidden_layers + [(PADDED_VOCAB_SIZE, hidden)]
    return sum(n * k for n, k in layers), 4 * sum(n for n, _ in layers)
