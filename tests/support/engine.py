"""A real engine in the test process: ``EngineActor`` without Ray around it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollout_server.engine import arguments
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec, engine_environment
from rollout_server.engine.facts import EngineFacts
from rollout_server.engine.protocol import GeneratedSample, GenerateRequest
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch
from shared.types import PauseMode, SpeculationMode
from shared.weights import build_manifest

MAX_DRAFT_LENGTH = 5
CONCURRENCY = 64
PROBE = "tests.support.worker_probe.WorkerProbe"
"""``worker_extension`` of engines whose KV cache and sampler a test looks into."""


@asynccontextmanager
async def running_engine(
    model: Path,
    *,
    engine: dict[str, Any] | None = None,
    drafter: dict[str, Any] | None = None,
    max_draft_length: int = MAX_DRAFT_LENGTH,
    dtype: Literal["float32", "bfloat16"] = "float32",
    worker_extension: str | None = None,
    speculation: dict[str, Any] | None = None,
) -> AsyncIterator[EngineActor]:
    """Start an engine with drafts of up to ``max_draft_length`` tokens, speculation off.

    Args:
        worker_extension: qualified name of a class that extends ``SlipstreamWorkerExtension``.
        speculation: more of the policy.
    """
    async with started_engine(
        model,
        engine=engine,
        drafter=drafter,
        max_draft_length=max_draft_length,
        dtype=dtype,
        worker_extension=worker_extension,
        speculation=speculation,
    ) as (actor, _):
        yield actor


@asynccontextmanager
async def started_engine(
    model: Path,
    *,
    engine: dict[str, Any] | None = None,
    drafter: dict[str, Any] | None = None,
    max_draft_length: int = MAX_DRAFT_LENGTH,
    dtype: Literal["float32", "bfloat16"] = "float32",
    worker_extension: str | None = None,
    speculation: dict[str, Any] | None = None,
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
        model=ModelConfig(path=str(model), dtype=dtype, max_model_len=512),
        engine=EngineConfig.model_validate({**settings, **(engine or {})}),
        drafter=DrafterConfig.model_validate(drafter or {}),
        speculation=SpeculationConfig.model_validate(
            {
                "mode": SpeculationMode.OFF,
                "num_speculative_tokens": max_draft_length,
                **(speculation or {}),
            }
        ),
        device="cpu",
    )
    saved = dict(os.environ)
    os.environ.update(engine_environment(spec))
    extension = arguments.WORKER_EXTENSION_CLASS
    arguments.WORKER_EXTENSION_CLASS = worker_extension or extension
    actor = EngineActor(spec)
    try:
        facts = await actor.start()
        os.environ.clear()
        os.environ.update(saved)
        arguments.WORKER_EXTENSION_CLASS = extension
        yield actor, facts
    finally:
        os.environ.clear()
        os.environ.update(saved)
        arguments.WORKER_EXTENSION_CLASS = extension
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
    return await actor._llm.collective_rpc("slipstream_drafter")


def greedy(num_tokens: int) -> SamplingOptions:
    """Greedy decoding of exactly this many tokens."""
    return SamplingOptions(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


async def probe(actor: EngineActor, method: str, *args: Any) -> Any:
    """Call a method of the ``worker_extension`` in the engine's only rank."""
    (result,) = await actor._llm.collective_rpc(method, args=args)
    return result


@asynccontextmanager
async def changing_draft_length(
    actor: EngineActor, lengths: Sequence[int], *, every_s: float = 0.0
) -> AsyncIterator[None]:
    """While inside, the engine drafts the next of ``lengths`` as often as it takes a new policy."""

    async def change_forever() -> None:
        for length in itertools.cycle(lengths):
            await speculate(actor, length)
            await asyncio.sleep(every_s)

    task = asyncio.create_task(change_forever())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def wait_for_tokens(actor: EngineActor, num_generation_tokens: int) -> None:
    """Until the engine has generated this many in its life."""
    # Of another process: there is nothing to wait on. Bounded by the test's timeout.
    while (await actor.load())["num_generation_tokens"] < num_generation_tokens:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def forget_prefixes(actor: EngineActor) -> None:
    """Empty the prefix cache; nothing may be running."""
    assert await actor._llm.reset_prefix_cache()
