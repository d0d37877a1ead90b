"""What being able to speculate costs an engine that does not: over several sets of fresh engines.

Two engines with the very same settings can differ by two per cent for as long as they live, in
either direction; which memory a process got seems to be part of its speed. One pair would say more
of that than of the drafter. So a set lives for a few alternations only, and has two engines without
a drafter: the one with it is compared with both, and what they say of each other is the noise.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import measure_batch, running_engine
from benchmarks.harness.speculation_sides import NUM_PROMPT_TOKENS, VOCAB_SIZE, engine_spec
from rollout_server.engine.actor import EngineActor
from shared.types import DrafterScheme

PLAIN, CONTROL, OFF = "plain", "control", "off"
"""Without a drafter, twice; with one that never drafts."""
Rounds = list[dict[str, float]]
"""Tokens per second by side."""


async def measure_set(
    model: Path,
    scheme: DrafterScheme,
    number: int,
    batches: Sequence[int],
    *,
    repeats: int,
    num_tokens: int,
) -> dict[int, Rounds]:
    """Start three engines, in another order each time, and let them take turns."""
    names = [PLAIN, CONTROL, OFF]
    async with AsyncExitStack() as stack:
        engines: dict[str, EngineActor] = {}
        for name in _rotated(names, number):
            spec = engine_spec(model, scheme=scheme if name == OFF else None)
            started = running_engine(replace(spec, engine_id=f"{name}-{number}"))
            engines[name] = await stack.enter_async_context(started)
        return {
            batch: [
                await _round(engines, _rotated(names, repeat), batch, repeat, num_tokens)
                for repeat in range(repeats + 1)
            ][1:]  # the first warms up
            for batch in batches
        }


async def _round(
    engines: Mapping[str, EngineActor],
    names: Sequence[str],
    batch: int,
    repeat: int,
    num_tokens: int,
) -> dict[str, float]:
    rates = {}
    for name in names:
        measured = await measure_batch(
            engines[name],
            f"{name}-{batch}-{repeat}",
            batch,
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            num_tokens=num_tokens,
            vocab_size=VOCAB_SIZE,
            seed=repeat,
        )
        rates[name] = measured.tokens_per_s
    shown = {name: round(rate, 1) for name, rate in rates.items()}
    print(f"off, batch {batch}, {repeat}: {shown}", file=sys.stderr)
    return rates


def summarize_off(sets: Sequence[Mapping[int, Rounds]], scheme: DrafterScheme) -> dict[str, Any]:
    """Ratios by batch: within a round, their median in a set, the median of the sets."""
    ratios: dict[str, list[float]] = {}
    controls: dict[str, list[float]] = {}
    for one in sets:
        for batch, rounds in one.items():
            ratios.setdefault(str(batch), []).append(
                statistics.median(2 * r[OFF] / (r[PLAIN] + r[CONTROL]) for r in rounds)
            )
            controls.setdefault(str(batch), []).append(
                statistics.median(r[CONTROL] / r[PLAIN] for r in rounds)
            )
    return {
        "off_ratio": {b: round(statistics.median(values), 3) for b, values in ratios.items()},
        "off_ratio_of_sets": {b: [round(v, 3) for v in values] for b, values in ratios.items()},
        "off_control_of_sets": {b: [round(v, 3) for v in values] for b, values in controls.items()},
        "off_scheme": scheme.value,
    }


def _rotated(names: Sequence[str], by: int) -> list[str]:
    shift = by % len(names)
    return [*names[shift:], *names[:shift]]
