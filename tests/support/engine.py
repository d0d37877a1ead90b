"""A real engine in the test process: ``EngineActor`` without Ray around it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_server.engine.actor import EngineActor, EngineFacts
from rollout_server.engine.arguments import EngineSpec, engine_environment
from rollout_server.engine.protocol import GeneratedSample, GenerateRequest
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch
from shared.types import PauseMode, SpeculationMode
from shared.weights import build_manifest

MAX_DRAFT_LENGTH = 5
CONCURRENCY = 64


@asynccontextmanager
async def running_engine(
    model: Path, *, engine: dict[str, Any] | None = None, drafter: dict[str, Any] | None = None
) -> AsyncIterator[EngineActor]:
    """Start an engine with drafts of up to ``MAX_DRAFT_LENGTH`` tokens, speculation off."""
    async with started_engine(model, engine=engine, drafter=drafter) as (actor, _):
        yield actor


@asynccontextmanager
async def started_engine(
    model: Path,
    *,
    engine: dict[str, Any] | None = None,
    drafter: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> AsyncIterator[tuple[EngineActor, EngineFacts]]:
    """The same, with what the engine said of itself when it had started."""
    settings = {
        "num_kv_blocks": 400,
        "block_size": 32,
        "kv_cache_memory_mib": 256,
        "max_num_seqs": CONCURRENCY,
    }
    spec = EngineSpec(
        engine_id="test-engine",
        index=0,
        model=ModelConfig.model_validate(
            {"path": str(model), "dtype": dtype, "max_model_len": 512}
        ),
        engine=EngineConfig.model_validate({**settings, **(engine or {})}),
        drafter=DrafterConfig.model_validate(drafter or {}),
        speculation=SpeculationConfig(
            mode=SpeculationMode.OFF, num_speculative_tokens=MAX_DRAFT_LENGTH
        ),
        device="cpu",
    )
    saved = dict(os.environ)
    os.environ.update(engine_environment(spec))
    actor = EngineActor(spec)
    try:
        facts = await actor.start()
        os.environ.clear()
        os.environ.update(saved)
        yield actor, facts
    finally:
        os.environ.clear()
        os.environ.update(saved)
        await actor.shutdown()


async def speculate(actor: EngineActor, num_speculative_tokens: int) -> None:
    """Draft exactly this many tokens from the next step on; 0 is off."""
    mode = SpeculationMode.ALWAYS if num_speculative_tokens else SpeculationMode.OFF
    await actor.set_speculation(
        SpeculationPatch(mode=mode, num_speculative_tokens=num_speculative_tokens or None)
    )


async def generate(
    actor: EngineActor,
    prompts: Sequence[list[int]],
    sampling: SamplingOptions,
    *,
    n: int = 1,
    name: str = "r",
) -> list[list[GeneratedSample]]:
    """All prompts at once; samples per prompt."""
    results = await asyncio.gather(
        *(
            actor.generate(
                GenerateRequest(
                    request_id=f"{name}-{index}", prompt_token_ids=prompt, n=n, sampling=sampling
                )
            )
            for index, prompt in enumerate(prompts)
        )
    )
    return [result.samples for result in results]


@dataclass(kw_only=True, slots=True)
class DraftCounts:
    """Drafts while a block ran."""

    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def rate(self) -> float:
        """Accepted share of the drafts."""
        assert self.num_drafted, "nothing was drafted"
        return self.num_accepted / self.num_drafted


@asynccontextmanager
async def acceptance(actor: EngineActor) -> AsyncIterator[DraftCounts]:
    """Counts what is drafted and accepted inside the block; filled in at its end."""
    counts = DraftCounts()
    before = await actor.speculation(0)
    yield counts
    after = await actor.speculation(0)
    counts.num_drafted = after.num_draft_tokens - before.num_draft_tokens
    counts.num_accepted = after.num_accepted_tokens - before.num_accepted_tokens


async def push(actor: EngineActor, model: Path, version: int, directory: Path) -> None:
    """Stage and commit the weights of a model directory."""
    segment = directory / f"slipstream-test-v{version}.safetensors"
    shutil.copy(model / "model.safetensors", segment)
    await actor.stage(version, str(segment), build_manifest(segment))
    await actor.commit(version, PauseMode.KEEP)
    segment.unlink()


async def drafter_memory(actor: EngineActor) -> list[dict[str, int]]:
    """Per rank: bytes and number of the drafter's own layers."""
    return await actor._llm.collective_rpc("slipstream_memory")


def greedy(num_tokens: int) -> SamplingOptions:
    """Greedy decoding of exactly this many tokens."""
    return SamplingOptions(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
