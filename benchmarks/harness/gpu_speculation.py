"""Speculation and requantization of one model shape on a CUDA device, as points and bars.

Two engines on one device alternate: one without a drafter, one with. Each point is measured with
the acceptance that random weights have, and with a synthetic acceptance that stands for a trained
model's. Times of the draft loops come from events on the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import (
    Measurement,
    measure_batch,
    running_engine,
    set_draft_length,
)
from benchmarks.harness.model_shapes import vocab_size, write_shape
from benchmarks.harness.worker_probes import (
    accept_synthetically,
    graph_counts,
    in_worker,
    take_draft_times_ms,
    time_drafting,
    time_requantization,
)
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.types import DrafterScheme, SpeculationMode

SYNTHETIC_ACCEPTANCE = 0.93
MAX_DRAFT_LENGTH = 6
NUM_PROMPT_TOKENS = 32
REQUANTIZATION_REPEATS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPlan:
    """What to measure."""

    shape: str
    scheme: DrafterScheme
    batches: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    num_tokens: int
    repeats: int


Round = dict[tuple[int | None, bool], tuple[Measurement, float]]
"""(draft length or None without a drafter, synthetic) -> measurement, median draft loop in ms."""


def engine_spec(plan: GpuPlan, directory: Path, *, with_drafter: bool) -> EngineSpec:
    """One of the two engines; they differ in nothing but the drafter."""
    model = write_shape(directory, plan.shape)
    return EngineSpec(
        engine_id="with-drafter" if with_drafter else "without-drafter",
        index=0,
        model=ModelConfig(path=str(model), dtype="bfloat16", max_model_len=1024),
        engine=EngineConfig(
            kv_cache_memory_mib=4096,
            gpu_memory_utilization=0.3,
            max_num_seqs=max(plan.batches),
            enforce_eager=False,
            enable_prefix_caching=False,
            vllm_args={
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                # Warming up takes longer than compiling what these runs need in their first round.
                "kernel_config": {"enable_jit_warmup": False},
            },
        ),
        drafter=DrafterConfig(enabled=with_drafter, scheme=plan.scheme),
        speculation=SpeculationConfig(
            mode=SpeculationMode.OFF, num_speculative_tokens=MAX_DRAFT_LENGTH
        ),
        device="cuda",
    )


async def run_shape(
    plan: GpuPlan,
    directory: Path,
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure everything; ``save`` gets what there is after every batch size.

    Raises:
        shared.errors.EngineError: an engine did not start.
    """
    result: dict[str, Any] = {"shape": plan.shape, "scheme": plan.scheme.value, "points": []}
    async with AsyncExitStack() as stack:
        engines: dict[bool, EngineActor] = {}
        for with_drafter in (False, True):
            spec = engine_spec(plan, directory, with_drafter=with_drafter)
            say(f"{plan.shape}: starting the engine {spec.engine_id}")
            engines[with_drafter] = await stack.enter_async_context(running_engine(spec))
        drafting = engines[True]
        result["graphs"] = await in_worker(drafting, graph_counts)
        result["requantization"] = await in_worker(
            drafting, time_requantization, REQUANTIZATION_REPEATS
        )
        say(f"{plan.shape}: requantization {result['requantization']['ms']:.1f} ms")
        save(result)
        await in_worker(drafting, time_drafting)
        for batch in plan.batches:
            rounds = [
                await measure_round(plan, engines, batch, repeat)
                for repeat in range(plan.repeats + 1)
            ]
            points = summarize(batch, rounds[1:])  # the first warms up
            result["points"] += points
            for point in points:
                say(f"{plan.shape}: {describe(point)}")
            save(result)
    return result


async def measure_round(
    plan: GpuPlan, engines: dict[bool, EngineActor], batch: int, repeat: int
) -> Round:
    """Every side once."""
    sides: list[tuple[int | None, bool]] = [(None, False)]
    for drafted in plan.draft_lengths:
        sides += [(drafted, False), (drafted, True)] if drafted else [(0, False)]
    measured: Round = {}
    for length, synthetic in sides[repeat % len(sides) :] + sides[: repeat % len(sides)]:
        engine = engines[length is not None]
        if length is not None:
            await set_draft_length(engine, length)
            rate = SYNTHETIC_ACCEPTANCE if synthetic else None
            await in_worker(engine, accept_synthetically, rate)
            await in_worker(engine, take_draft_times_ms)
        measurement = await measure_batch(
            engine,
            f"{batch}-{repeat}-{length}-{synthetic}",
            batch,
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            num_tokens=plan.num_tokens,
            vocab_size=vocab_size(plan.shape),
            seed=repeat,
        )
        times_ms = await in_worker(engine, take_draft_times_ms) if length else []
        measured[length, synthetic] = measurement, statistics.median(times_ms or [0.0])
    return measured


def summarize(batch: int, rounds: list[Round]) -> list[dict[str, Any]]:
    """One point per side: medians, and ratios to the side without a drafter of the same round.

    ``c`` is one draft pass over one plain step; ``v`` is the rest of a cycle (verification,
    rejection, bookkeeping) over one plain step.
    """
    points = []
    for length, synthetic in rounds[0]:
        ratios, speeds, lengths, costs, verifications = [], [], [], [], []
        for measured in rounds:
            plain, _ = measured[None, False]
            side, draft_ms = measured[length, synthetic]
            plain_step_ms = 1000 * batch / plain.tokens_per_s
            ratios.append(side.tokens_per_s / plain.tokens_per_s)
            speeds.append(side.tokens_per_s)
            lengths.append(side.mean_acceptance_length)
            if length:
                cycle_ms = 1000 * batch * side.mean_acceptance_length / side.tokens_per_s
                costs.append(draft_ms / length / plain_step_ms)
                verifications.append((cycle_ms - draft_ms) / plain_step_ms)
        point: dict[str, Any] = {
            "batch": batch,
            "k": length,
            "synthetic_acceptance": SYNTHETIC_ACCEPTANCE if synthetic else None,
            "tokens_per_s": round(statistics.median(speeds), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "mean_acceptance_length": round(statistics.median(lengths), 3),
        }
        if length:
            c, v = statistics.median(costs), statistics.median(verifications)
            point |= {"c": round(c, 3), "v": round(v, 3)}
            point["predicted_ratio"] = round(statistics.median(lengths) / (length * c + v), 3)
        points.append(point)
    return points


def describe(point: dict[str, Any]) -> str:
    """A progress line."""
    side = "no drafter" if point["k"] is None else f"K = {point['k']}"
    if point["synthetic_acceptance"] is not None:
        side += f" at {point['synthetic_acceptance']}"
    costs = f", c {point['c']:.2f}, v {point['v']:.2f}" if "c" in point else ""
    return (
        f"batch {point['batch']}, {side}: {point['tokens_per_s']:.0f} tokens/s, "
        f"{point['ratio']:.2f}x, length {point['mean_acceptance_length']:.2f}{costs}"
    )
