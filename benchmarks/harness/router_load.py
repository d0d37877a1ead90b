"""What the router costs with many engines and thousands of groups in flight, nothing else around.

The router is the server's own. Engines keep a group for a drawn time and then answer at once, so
that all there is to wait for between a group's arrival and its dispatch is the router and the event
loop it shares with everything that is in flight.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.modelled_engine import EngineTimes, ModelledEngine
from benchmarks.harness.modelled_server import ModelledPool
from rollout_server.engine.protocol import GenerateRequest, GenerateResult
from rollout_server.router.router import Router
from shared.schemas.rollouts import SamplingOptions

MEAN_HOLD_S = 4.0
"""How long an engine keeps a group: with 2,000 in flight, 500 arrive per second."""
MAX_TOKENS = (64, 128, 256, 512)
PROMPT = list(range(32))


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterPlan:
    """What to measure."""

    num_engines: int
    num_in_flight: int
    """Groups; every one that is answered is followed by the next."""
    n: int
    """Samples of a group."""
    warm_up_s: float
    duration_s: float
    mean_hold_s: float = MEAN_HOLD_S


@dataclass(kw_only=True, slots=True)
class Dispatches:
    """When groups reached an engine."""

    at_s: dict[str, float]

    def note(self, request_id: str) -> None:
        self.at_s[request_id] = time.perf_counter()


class HoldingEngine(ModelledEngine):
    """Keeps a group for a while."""

    def __init__(
        self, engine_id: str, dispatches: Dispatches, draw: random.Random, mean_hold_s: float
    ) -> None:
        super().__init__(engine_id, EngineTimes())
        self._dispatches = dispatches
        self._draw = draw
        self._mean_hold_s = mean_hold_s

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self._dispatches.note(request.request_id)
        await asyncio.sleep(self._draw.expovariate(1 / self._mean_hold_s))
        return await super().generate(request)


class HoldingPool(ModelledPool):
    """Any number of them."""

    def __init__(self, engines: Sequence[HoldingEngine]) -> None:
        super().__init__(0, EngineTimes())
        self._members = list(engines)
        self.target_count = len(engines)


class ChoiceClock:
    """CPU time of the choices a router's queue makes: reading 64 loads, comparing, reserving."""

    def __init__(self, router: Router) -> None:
        self.num_choices = 0
        self.cpu_s = 0.0
        queue = router._queue
        original = queue.dispatch

        def timed() -> None:
            waiting = len(queue._waiters)
            began_s = time.thread_time()
            original()
            self.cpu_s += time.thread_time() - began_s
            self.num_choices += waiting - len(queue._waiters)

        # On the instance: other routers of this process keep theirs.
        setattr(queue, "dispatch", timed)  # noqa: B010 - mypy refuses the assignment


async def measure_router(plan: RouterPlan, seed: int) -> dict[str, float]:
    """One stretch of steady load, after the burst with which it begins."""
    draw = random.Random(seed)
    dispatches = Dispatches(at_s={})
    engines = [
        HoldingEngine(f"engine-{number}", dispatches, draw, plan.mean_hold_s)
        for number in range(plan.num_engines)
    ]
    num_samples = plan.num_in_flight * plan.n
    router = Router(
        HoldingPool(engines),
        max_pending_samples=num_samples,
        # Twice an even share: never a wait for room, which would be the engines' and not ours.
        max_samples_per_engine=2 * -(-num_samples // plan.num_engines),
        engine_wait_timeout_s=60.0,
        max_attempts=1,
    )
    clock = ChoiceClock(router)
    arrivals: dict[str, float] = {}
    began_s = time.perf_counter()
    stop_s = plan.warm_up_s + plan.duration_s

    async def one_after_the_other(client: int) -> None:
        number = 0
        while time.perf_counter() - began_s < stop_s:
            request_id = f"c{client}-{number}"
            number += 1
            request = GenerateRequest(
                request_id=request_id,
                prompt_token_ids=PROMPT,
                n=plan.n,
                sampling=SamplingOptions(max_tokens=draw.choice(MAX_TOKENS)),
            )
            arrivals[request_id] = time.perf_counter()
            await router.generate(request)

    await router.start()
    tasks = [asyncio.create_task(one_after_the_other(c)) for c in range(plan.num_in_flight)]
    try:
        await asyncio.sleep(plan.warm_up_s)
        counted_from_s = time.perf_counter()
        cpu_s, choice_cpu_s, num_choices = time.process_time(), clock.cpu_s, clock.num_choices
        await asyncio.sleep(plan.duration_s)
        counted_to_s = time.perf_counter()
        cpu_s = time.process_time() - cpu_s
        choice_cpu_s, num_choices = clock.cpu_s - choice_cpu_s, clock.num_choices - num_choices
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await router.close()
    waits_ms = waits(arrivals, dispatches.at_s, counted_from_s, counted_to_s)
    return {
        "ms_p50": statistics.median(waits_ms),
        "ms_p99": percentile(waits_ms, 0.99),
        "ms_max": max(waits_ms),
        "groups_per_s": len(waits_ms) / (counted_to_s - counted_from_s),
        "choice_cpu_us": choice_cpu_s / num_choices * 1e6,
        "cpu_us": cpu_s / len(waits_ms) * 1e6,
        "cpu_share": cpu_s / (counted_to_s - counted_from_s),
    }


def waits(
    arrivals: dict[str, float], dispatches: dict[str, float], from_s: float, to_s: float
) -> list[float]:
    """Milliseconds from arrival to dispatch of the groups that arrived within a stretch.

    Raises:
        AssertionError: one of them never reached an engine, though there was room for all.
    """
    inside = [name for name, at_s in arrivals.items() if from_s <= at_s < to_s]
    # The last arrivals may not have had their turn when the clock was stopped.
    lost = [name for name in inside if name not in dispatches]
    assert len(lost) <= len(inside) * 0.01, f"{len(lost)} of {len(inside)} groups went nowhere"
    return [(dispatches[name] - arrivals[name]) * 1000 for name in inside if name in dispatches]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def router_figures(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(name: str) -> float:
        return round(statistics.median(one[name] for one in rounds), 3)

    p50 = [one["ms_p50"] for one in rounds]
    return {
        "router_ms_p50": median("ms_p50"),
        "router_ms_p50_spread": [round(min(p50), 3), round(max(p50), 3)],
        "router_ms_p99": median("ms_p99"),
        "router_choice_cpu_us": median("choice_cpu_us"),
        "router_cpu_us_per_group": median("cpu_us"),
        "router_groups_per_s": median("groups_per_s"),
    }
