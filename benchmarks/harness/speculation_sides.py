"""The sides of ``benchmarks.speculation``: engines that differ in their drafter only, in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.engines import Measurement, measure_batch, set_draft_length
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.types import DrafterScheme, SpeculationMode

NUM_PROMPT_TOKENS = 32
MAX_DRAFT_LENGTH = 4
VOCAB_SIZE = 32000


class Side(NamedTuple):
    """What is measured against what."""

    scheme: DrafterScheme | None
    """None: an engine started without a drafter."""
    k: int


PLAIN = Side(None, 0)
Rounds = list[dict[Side, Measurement]]


def engine_spec(model: Path, *, scheme: DrafterScheme | None) -> EngineSpec:
    """One of the engines; they differ in nothing but the drafter."""
    return EngineSpec(
        engine_id=scheme or "without-drafter",
        index=0,
        model=ModelConfig(path=str(model), dtype="bfloat16", max_model_len=512),
        engine=EngineConfig(
            kv_cache_memory_mib=512,
            max_num_seqs=32,
            block_size=32,
            cpu_cores=[f"0-{(os.cpu_count() or 1) - 1}"],
        ),
        drafter=DrafterConfig(enabled=scheme is not None, scheme=scheme or DrafterScheme.AUTO),
        speculation=SpeculationConfig(
            mode=SpeculationMode.OFF, num_speculative_tokens=MAX_DRAFT_LENGTH
        ),
        device="cpu",
    )


async def alternate(
    engines: dict[DrafterScheme | None, EngineActor],
    sides: Sequence[Side],
    batch: int,
    repeats: int,
    num_tokens: int,
) -> Rounds:
    """Measure all sides ``repeats`` times in turn, after one uncounted round."""
    rounds: Rounds = []
    for repeat in range(repeats + 1):
        # Rotated, so that no side always runs first after a pause.
        shift = repeat % len(sides)
        measured: dict[Side, Measurement] = {}
        for side in [*sides[shift:], *sides[:shift]]:
            engine = engines[side.scheme]
            if side.scheme is not None:
                await set_draft_length(engine, side.k)
            measured[side] = await measure_batch(
                engine,
                f"speculation-{batch}-{repeat}-{side.scheme}-{side.k}",
                batch,
                num_prompt_tokens=NUM_PROMPT_TOKENS,
                num_tokens=num_tokens,
                vocab_size=VOCAB_SIZE,
                seed=repeat,
            )
        if repeat > 0:
            rounds.append(measured)
        shown = {
            f"{s.scheme or 'plain'}/{s.k}": round(m.tokens_per_s, 1) for s, m in measured.items()
        }
        print(f"speculation, batch {batch}, {repeat}/{repeats}: {shown}", file=sys.stderr)
    return rounds


def ratios(rounds: Rounds, side: Side) -> list[float]:
    """Throughput against the engine without a drafter, per repeat."""
    return [r[side].tokens_per_s / r[PLAIN].tokens_per_s for r in rounds]
