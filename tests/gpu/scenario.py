"""One engine's life, collected: the tests look at different sides of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.engines import running_engine, set_draft_length
from benchmarks.harness.worker_probes import (
    graph_counts,
    in_worker,
    packed_addresses,
    replay_and_eager_drafts,
)
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.protocol import GeneratedSample, GenerateRequest
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.schemas.rollouts import SamplingOptions
from shared.types import DrafterScheme, PauseMode, SpeculationMode
from tests.support.models import random_prompts

MAX_DRAFT_LENGTH = 5
NUM_PROMPTS = 40
NUM_GREEDY_TOKENS = 48
NUM_SEQUENCES = 1600
SEQUENCE_TOKENS = 16
SAMPLED_PROMPT = [5, 9, 4, 7, 3] * 4
REPLAYED_BATCHES = ((1, 1), (4, 3), (8, 8))
"""(captured batch size, rows in use)."""


@dataclass(slots=True)
class EngineOutputs:
    """Everything the engine tests look at."""

    greedy: dict[int, list[GeneratedSample]] = field(default_factory=dict)
    """By draft length, in the order of the prompts."""
    sampled: dict[int, list[list[int]]] = field(default_factory=dict)
    """Independent sequences from one prompt at temperature 1, by draft length."""
    seeded: dict[str, list[int]] = field(default_factory=dict)
    """Tokens of a request with a seed of its own, asked for twice."""
    graphs: dict[str, int] = field(default_factory=dict)
    replayed: dict[tuple[int, int, int], tuple[list[list[int]], list[list[int]]]] = field(
        default_factory=dict
    )
    """(batch size, rows, draft length) -> drafts of the replayed and of the uncaptured loop."""
    addresses: tuple[list[int], list[int]] = ([], [])
    """Of the drafter's packed tensors, before and after packing them again."""
    after_push: dict[int, list[GeneratedSample]] = field(default_factory=dict)
    """Greedy, by draft length, under the weights pushed last."""


async def collect_outputs(model: Path, pushed_model: Path) -> EngineOutputs:
    """Start a float32 engine with graphs, take it through everything, then push new weights."""
    spec = EngineSpec(
        engine_id="gpu-test",
        index=0,
        model=ModelConfig(path=str(model), dtype="float32", max_model_len=512),
        engine=EngineConfig(
            kv_cache_memory_mib=256,
            gpu_memory_utilization=0.2,
            max_num_seqs=64,
            enforce_eager=False,
            enable_prefix_caching=False,
            vllm_args={"skip_tokenizer_init": True},  # tokens are all that is looked at
        ),
        drafter=DrafterConfig(scheme=DrafterScheme.INT8),
        speculation=SpeculationConfig(
            mode=SpeculationMode.OFF, num_speculative_tokens=MAX_DRAFT_LENGTH
        ),
        device="cuda",
    )
    outputs = EngineOutputs()
    async with running_engine(spec) as engine:
        outputs.graphs = await in_worker(engine, graph_counts)
        for batch, rows in REPLAYED_BATCHES:
            for length in range(1, MAX_DRAFT_LENGTH + 1):
                outputs.replayed[batch, rows, length] = await in_worker(
                    engine, replay_and_eager_drafts, batch, rows, length
                )
        before = await in_worker(engine, packed_addresses, False)
        outputs.addresses = before, await in_worker(engine, packed_addresses, True)
        for length in range(MAX_DRAFT_LENGTH + 1):
            await set_draft_length(engine, length)
            outputs.greedy[length] = await greedy_samples(engine, f"greedy-{length}")
        for length in (0, 3):
            await set_draft_length(engine, length)
            outputs.sampled[length] = await sampled_sequences(engine, f"sampled-{length}")
        for name in ("first", "second"):
            outputs.seeded[name] = await seeded_tokens(engine, f"seeded-{name}")
        path = str(pushed_model / "model.safetensors")
        await engine._llm.collective_rpc("slipstream_stage", args=(1, path))
        await engine.commit(1, PauseMode.KEEP)
        for length in (0, 3):
            await set_draft_length(engine, length)
            outputs.after_push[length] = await greedy_samples(engine, f"pushed-{length}")
    return outputs


async def generate(
    engine: EngineActor, prompts: list[list[int]], sampling: SamplingOptions, name: str, n: int = 1
) -> list[GeneratedSample]:
    """All samples of all prompts, in order."""
    results = await asyncio.gather(
        *(
            engine.generate(
                GenerateRequest(
                    request_id=f"{name}-{index}", prompt_token_ids=prompt, n=n, sampling=sampling
                )
            )
            for index, prompt in enumerate(prompts)
        )
    )
    return [sample for result in results for sample in result.samples]


async def greedy_samples(engine: EngineActor, name: str) -> list[GeneratedSample]:
    sampling = SamplingOptions(temperature=0.0, max_tokens=NUM_GREEDY_TOKENS, ignore_eos=True)
    return await generate(engine, random_prompts(NUM_PROMPTS, seed=1), sampling, name)


async def sampled_sequences(engine: EngineActor, name: str) -> list[list[int]]:
    sampling = SamplingOptions(temperature=1.0, max_tokens=SEQUENCE_TOKENS, ignore_eos=True)
    prompts = [SAMPLED_PROMPT] * (NUM_SEQUENCES // 10)
    return [sample.token_ids for sample in await generate(engine, prompts, sampling, name, n=10)]


async def seeded_tokens(engine: EngineActor, name: str) -> list[int]:
    sampling = SamplingOptions(temperature=1.0, max_tokens=32, ignore_eos=True, seed=7)
    return (await generate(engine, [SAMPLED_PROMPT], sampling, name))[0].token_ids
