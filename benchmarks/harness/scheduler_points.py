"""Steady loads: every fixed draft length and the scheduler take turns within one running batch.

A load is a number of sequences with a context. While they generate, the sides take turns in slices
of a second or so, in another order each round, and the tokens of each slice are counted. What a
shared machine does to one side it then does to its neighbours too, which it does not where each
side runs a batch of its own for many seconds. Batches follow each other until there are enough
rounds.

The scheduler watches the slices of the other sides as well, as it watches any step; what it knows
of a draft length may come from there. That is kinder to it than a load where it is alone.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GenerateRequest
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch

SETTLE_S = 0.25
"""From the begin of a turn to its first counted step: the steps before still verify what the side
before drafted."""
FEW_REQS = 4
START_TIMEOUT_S = 60.0


class Load(NamedTuple):
    """A steady load."""

    num_reqs: int
    num_prompt_tokens: int
    num_tokens: int = 480
    """Longest a sequence gets in one batch; batches are begun anew from half of it on."""

    @property
    def name(self) -> str:
        return f"{self.num_reqs}x{self.num_prompt_tokens}"


class Slice(NamedTuple):
    """One turn of a side."""

    tokens_per_s: float
    steps_per_k: list[int]


class Batches:
    """Keeps a load running: batch after batch of its sequences, begun anew when one nears its end.

    Args:
        load: what runs.
        vocab_size: prompts are random token ids below it.
    """

    def __init__(self, engine: EngineActor, load: Load, vocab_size: int) -> None:
        self._engine = engine
        self._load = load
        self._vocab_size = vocab_size
        self._number = 0
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._first_tokens = 0

    async def has_room(self) -> bool:
        """Whether a turn is likely to fit into what is left of the batch."""
        if not self._tasks or self.has_thinned_out:
            return False
        made, _ = await tokens_made(self._engine)
        return (made - self._first_tokens) / self._load.num_reqs < 0.5 * self._load.num_tokens

    @property
    def has_thinned_out(self) -> bool:
        """Whether a sequence has come to its end."""
        return any(task.done() for task in self._tasks.values())

    async def begin(self) -> None:
        """End what runs, begin the next batch and wait until all of it decodes."""
        await self.end()
        load = self._load
        generator = random.Random(f"{load.name}-{self._number}")
        sampling = SamplingOptions(temperature=1.0, max_tokens=load.num_tokens, ignore_eos=True)
        self._first_tokens, _ = await tokens_made(self._engine)
        for index in range(load.num_reqs):
            prompt = [generator.randrange(self._vocab_size) for _ in range(load.num_prompt_tokens)]
            request = GenerateRequest(
                request_id=f"{load.name}-{self._number}-{index}",
                prompt_token_ids=prompt,
                n=1,
                sampling=sampling,
            )
            task = asyncio.create_task(self._engine.generate(request))
            self._tasks[request.request_id] = task
        self._number += 1
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                facts = await self._engine.load()
                made = int(facts["num_generation_tokens"]) - self._first_tokens
                if facts["num_waiting_reqs"] == 0 and made >= 2 * load.num_reqs:
                    break
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        """Abort what runs."""
        for request_id in self._tasks:
            await self._engine.abort(request_id)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()


async def take_turn(engine: EngineActor, patch: SpeculationPatch, slice_s: float) -> Slice:
    """One side's slice of a running batch."""
    await engine.set_speculation(patch)
    await asyncio.sleep(SETTLE_S)
    before = (await engine.speculation(2**62)).num_steps_per_k
    tokens, started = await tokens_made(engine)
    await asyncio.sleep(slice_s)
    more_tokens, ended = await tokens_made(engine)
    after = (await engine.speculation(2**62)).num_steps_per_k
    return Slice(
        tokens_per_s=(more_tokens - tokens) / (ended - started),
        steps_per_k=[b - a for a, b in zip(before, after, strict=True)],
    )


async def tokens_made(engine: EngineActor) -> tuple[int, float]:
    """Tokens made so far, and when: answered between two steps, so that no step is cut."""
    tokens = int((await engine.load())["num_generation_tokens"])
    return tokens, time.perf_counter()


async def measure_point(
    engine: EngineActor,
    load: Load,
    sides: Mapping[str, SpeculationPatch],
    *,
    rounds: int,
    slice_s: float,
    vocab_size: int,
) -> list[dict[str, Slice]]:
    """``rounds`` rounds of all sides, after one uncounted.

    Args:
        slice_s: of a turn with ``FEW_REQS`` sequences or more; with fewer it is longer, since the
            luck of few drafts weighs more than the machine's noise.
    """
    done: list[dict[str, Slice]] = []
    names = list(sides)
    slice_s *= max(FEW_REQS / load.num_reqs, 1.0)
    batches = Batches(engine, load, vocab_size)
    try:
        for number in range(rounds + 1):
            random.Random(number).shuffle(names)
            turns: dict[str, Slice] = {}
            while len(turns) < len(names):
                name = names[len(turns)]
                if not await batches.has_room():
                    await batches.begin()
                turn = await take_turn(engine, sides[name], slice_s)
                if not batches.has_thinned_out:  # else it is taken again, in the next batch
                    turns[name] = turn
            done.append(turns)
            rates = {name: round(turns[name].tokens_per_s, 1) for name in sorted(turns)}
            print(f"point {load.name}, {number}/{rounds}: {rates}", file=sys.stderr)
    finally:
        await batches.end()
    return done[1:]


def summarize_point(
    load: Load, rounds: Sequence[Mapping[str, Slice]], adaptive: str
) -> dict[str, Any]:
    """Ratios are taken within a round, then their median over the rounds.

    The best fixed length is the one that did best in this very measurement, which flatters it: of
    several alike, noise picks the luckiest. ``ratio_to_best_of_others`` has the same ratio with
    each round's best chosen by the other rounds.
    """
    fixed = [side for side in rounds[0] if side != adaptive]
    rates = [{side: turn.tokens_per_s for side, turn in r.items()} for r in rounds]
    over_off = {side: _median_ratio(rates, side, "0") for side in (*fixed, adaptive)}
    best = max(fixed, key=over_off.__getitem__)
    to_best = [r[adaptive] / r[best] for r in rates]
    held_out = []
    for index, r in enumerate(rates):
        others = rates[:index] + rates[index + 1 :]
        chosen = max(fixed, key=lambda side: _median_ratio(others, side, "0"))
        held_out.append(r[adaptive] / r[chosen])
    steps = [sum(counts) for counts in zip(*(r[adaptive].steps_per_k for r in rounds), strict=True)]
    return {
        "load": load.name,
        "rounds": len(rounds),
        "best_fixed_k": int(best),
        "fixed_ratios_to_off": {side: round(over_off[side], 3) for side in sorted(fixed)},
        "adaptive_ratio_to_off": round(over_off[adaptive], 3),
        "ratio_to_best_fixed": round(statistics.median(to_best), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(to_best, n=4)[::2]],
        "ratio_to_best_of_others": round(statistics.median(held_out), 3),
        "adaptive_steps_per_k": steps,
        "sign_right": (sum(steps[1:]) > steps[0]) == (best != "0"),
    }


def _median_ratio(rates: Sequence[Mapping[str, float]], side: str, other: str) -> float:
    return statistics.median(r[side] / r[other] for r in rates)
