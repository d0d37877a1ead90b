"""Real engines without Ray or HTTP around them: ``EngineActor`` in this process."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec, engine_environment
from rollout_server.engine.protocol import GenerateRequest
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationMode


@asynccontextmanager
async def running_engine(spec: EngineSpec) -> AsyncIterator[EngineActor]:
    """Start an engine with its own environment; stop it at the end."""
    saved = dict(os.environ)
    os.environ.update(engine_environment(spec))
    actor = EngineActor(spec)
    try:
        await actor.start()
        yield actor
    finally:
        await actor.shutdown()
        os.environ.clear()
        os.environ.update(saved)


async def set_draft_length(engine: EngineActor, num_speculative_tokens: int) -> None:
    """Draft exactly this many tokens at every step; 0 is off."""
    mode = SpeculationMode.ALWAYS if num_speculative_tokens else SpeculationMode.OFF
    await engine.set_speculation(
        SpeculationPatch(mode=mode, num_speculative_tokens=num_speculative_tokens or None)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One timed batch."""

    tokens_per_s: float
    step_s: float
    """Wall-clock seconds per engine step."""
    mean_acceptance_length: float
    """Of this batch; 0 when nothing was drafted."""
    acceptance_per_position: tuple[float, ...] = ()
    """Share of drafts whose first, second, ... token was accepted."""


async def measure_batch(
    engine: EngineActor,
    name: str,
    batch: int,
    *,
    num_prompt_tokens: int,
    num_tokens: int,
    vocab_size: int,
    seed: int,
) -> Measurement:
    """Generate ``batch`` sequences of exactly ``num_tokens`` at temperature 1, all at once.

    Prompts are distinct, so that no KV block is shared.
    """
    generator = random.Random(seed)
    sampling = SamplingOptions(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    requests = [
        GenerateRequest(
            request_id=f"{name}-{index}",
            prompt_token_ids=[generator.randrange(vocab_size) for _ in range(num_prompt_tokens)],
            n=1,
            sampling=sampling,
        )
        for index in range(batch)
    ]
    before = await engine.speculation(2**62)
    started = time.perf_counter()
    await asyncio.gather(*(engine.generate(request) for request in requests))
    elapsed_s = time.perf_counter() - started
    after = await engine.speculation(2**62)
    num_drafts = after.num_drafts - before.num_drafts
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    per_position = [
        later - earlier
        for later, earlier in zip(
            after.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, strict=True
        )
    ]
    # An engine without a drafter decides nothing and counts no steps: it takes one per token.
    num_steps = after.num_steps - before.num_steps or num_tokens
    return Measurement(
        tokens_per_s=batch * num_tokens / elapsed_s,
        step_s=elapsed_s / num_steps,
        mean_acceptance_length=1 + accepted / num_drafts if num_drafts else 0.0,
        acceptance_per_position=tuple(
            count / num_drafts for count in per_position if num_drafts and count
        ),
    )


def ensure_model(path: Path, preset: str) -> Path:
    """A random-weight benchmark model, made once."""
    from shared.config.trainer import ArithmeticTaskConfig
    from trainer.demo_model.build import make_model

    make_model(path, preset, 0, 0, ArithmeticTaskConfig(), lambda _: None)
    return path
