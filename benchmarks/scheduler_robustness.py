"""What the adaptive scheduler does when the world changes under it, against never speculating.

Three scenarios on a real engine with the wide model, each run with speculation off and with
``adaptive`` in turn, on the same work:

- *slow*: the worker is stopped for half of the time, from a third of the work on;
- *burst*: one sequence runs alone, then 23 more arrive at once;
- *collapse*: after a push, drafts are accepted with a chance of 0.3 (verification's verdict is
  replaced, which only benchmarks can do), until another push mends it.

Both sides make the same tokens, so they are compared by progress: for every window of 30 seconds of
the adaptive run, the seconds that off needed for the same tokens over 30. Recovery is the time from
the event to the last choice, of the ten seconds after it, that hindsight calls bad
(``harness/recovery.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import ensure_model, running_engine
from benchmarks.harness.progress import Progress, worst_window
from benchmarks.harness.recovery import Hindsight, Recovery, recovery
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.worker_probes import (
    SERIALIZATION_VARIABLE,
    accept_synthetically,
    in_worker,
)
from benchmarks.scheduler import ADAPTIVE, MIXED_SIDES, VOCAB_SIZE, engine_spec
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GenerateRequest
from rollout_server.speculation.calibration import find_calibration
from rollout_server.speculation.cost_model import CostModel
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationStep
from shared.types import DrafterScheme

TURN_S = 0.005
COLLAPSED_ACCEPTANCE = 0.3
NUM_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Event:
    """What a scenario did to the engine."""

    began_unix_s: float
    ended_unix_s: float = float("inf")
    acceptance: float | None = None
    """Of every position while it lasted; None: not touched."""


@dataclass(kw_only=True, slots=True)
class Run:
    """One side of one scenario."""

    progress: list[tuple[float, int]]
    """Seconds since the start, tokens made until then."""
    event: Event
    acceptance_per_pos: tuple[float, ...]
    """Known at the end of the run."""
    steps: list[SpeculationStep]

    @property
    def seconds(self) -> float:
        return self.progress[-1][0]


async def sequences(engine: EngineActor, name: str, num_reqs: int, num_tokens: int) -> None:
    """Sequences of exactly this length, all at once."""
    generator = random.Random(name)
    sampling = SamplingOptions(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    prompts = [
        [generator.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(num_reqs)
    ]
    await asyncio.gather(
        *(
            engine.generate(
                GenerateRequest(
                    request_id=f"{name}-{index}", prompt_token_ids=prompt, n=1, sampling=sampling
                )
            )
            for index, prompt in enumerate(prompts)
        )
    )


@contextlib.contextmanager
def at_half_speed(pid: int) -> Iterator[None]:
    """Stop a process for every second few milliseconds, all of its threads at once.

    Spinning competitors would do worse than halve it: OpenMP's threads wait for each other, and so
    for whoever of them was put aside last.
    """
    done = threading.Event()

    def take_turns() -> None:
        try:
            while not done.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(TURN_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(TURN_S)
        finally:
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=take_turns, name="half-speed")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def process_id(worker: Any) -> int:
    """Runs in the worker."""
    del worker
    return os.getpid()


async def slow(engine: EngineActor, progress: Progress, name: str) -> Event:
    """Two sequences; from a third on the worker gets half of the time."""
    pid = await in_worker(engine, process_id)
    work = asyncio.create_task(sequences(engine, name, 2, 700))
    await progress.reached(450)
    began = time.time()
    with at_half_speed(pid):
        await work
    return Event(began)


async def burst(engine: EngineActor, progress: Progress, name: str) -> Event:
    """One sequence, joined by 23."""
    alone = asyncio.create_task(sequences(engine, f"{name}-alone", 1, 900))
    await progress.reached(300)
    began = time.time()
    await sequences(engine, f"{name}-burst", 23, 100)
    await alone
    return Event(began)


async def collapse(engine: EngineActor, progress: Progress, name: str) -> Event:
    """Two sequences; from the first to the second third drafts are hardly ever accepted."""
    work = asyncio.create_task(sequences(engine, name, 2, 900))
    await progress.reached(600)
    await in_worker(engine, accept_synthetically, COLLAPSED_ACCEPTANCE)
    await engine._core("slipstream_set_weight_versions", *_next_versions())
    began = time.time()
    await progress.reached(1200)
    ended = time.time()
    await in_worker(engine, accept_synthetically, None)
    await engine._core("slipstream_set_weight_versions", *_next_versions())
    await work
    return Event(began, ended, COLLAPSED_ACCEPTANCE)


_version = 0


def _next_versions() -> tuple[int, int]:
    global _version
    _version += 1
    return _version, _version


Scenario = Callable[[EngineActor, Progress, str], Awaitable[Event]]
SCENARIOS: dict[str, Scenario] = {"slow": slow, "burst": burst, "collapse": collapse}


async def run_side(engine: EngineActor, scenario: str, side: str, repeat: int) -> Run:
    await engine.set_speculation(MIXED_SIDES[side])
    before = await engine.speculation(2**62)
    progress = Progress(engine)
    async with progress.watching():
        # The same name for both sides: the same prompts.
        event = await SCENARIOS[scenario](engine, progress, f"{scenario}-{repeat}")
    report = await engine.speculation(before.num_steps)
    return Run(
        progress=progress.points,
        event=event,
        acceptance_per_pos=tuple(report.acceptance_per_pos),
        steps=report.history,
    )


def recovery_of(run: Run, cost_model: CostModel) -> Recovery:
    """Judged by the acceptance that the scenario set, or that the engine had found by its end."""
    event = run.event
    acceptance = run.acceptance_per_pos
    if event.acceptance is not None:
        acceptance = (event.acceptance,) * len(acceptance)
    hindsight = Hindsight(cost_model=cost_model, acceptance_per_pos=acceptance)
    return recovery(run.steps, event.began_unix_s, event.ended_unix_s, hindsight)


def calibrated_model(engine: EngineActor) -> CostModel:
    """The cost model of this machine.

    Raises:
        SystemExit: it was not calibrated, so that nothing can be judged.
    """
    key = engine.calibration_key(DrafterScheme.INT8)
    calibration = find_calibration(key, None)
    if calibration is None:
        raise SystemExit(f"no calibration {key.file_name}: run slipstream calibrate")
    return calibration.cost_model


async def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    spec = engine_spec(model, num_places=24, kv_cache_mib=512)
    scenarios = []
    async with running_engine(spec) as engine:
        cost_model = calibrated_model(engine)
        await sequences(engine, "warm-up", 4, 32)
        for name in options.scenarios:
            runs: list[dict[str, Run]] = []
            for repeat in range(options.repeats):
                sides = ["off", ADAPTIVE] if repeat % 2 == 0 else [ADAPTIVE, "off"]
                runs.append({side: await run_side(engine, name, side, repeat) for side in sides})
                shown = {side: round(run.seconds, 1) for side, run in runs[-1].items()}
                print(f"{name}, {repeat + 1}/{options.repeats}, seconds: {shown}", file=sys.stderr)
            scenarios.append(summarize(name, runs, cost_model))
        report = await engine.speculation(2**62)
    return {
        "bench": "scheduler_robustness",
        "cost_model": report.cost_model,
        "scenarios": scenarios,
    }


def summarize(name: str, runs: Sequence[dict[str, Run]], cost_model: CostModel) -> dict[str, Any]:
    """Medians over the repeats, and the worst of all windows."""
    ratios = [run["off"].seconds / run[ADAPTIVE].seconds for run in runs]
    recoveries = [recovery_of(run[ADAPTIVE], cost_model) for run in runs]
    windows = [worst_window(run[ADAPTIVE].progress, run["off"].progress) for run in runs]
    return {
        "name": name,
        "ratio_to_off": round(statistics.median(ratios), 3),
        "worst_window_ratio": round(statistics.median(windows), 3),
        "worst_window_ratios": [round(window, 3) for window in windows],
        "recovery_s": round(statistics.median(r.last_bad_s for r in recoveries), 2),
        "recoveries": [
            {name: round(seconds, 2) for name, seconds in asdict(r).items()} for r in recoveries
        ],
        "seconds": [{side: round(run.seconds, 1) for side, run in r.items()} for r in runs],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=Path(".cache/models/wide-450m"))
    options = parser.parse_args()
    os.environ[SERIALIZATION_VARIABLE] = "1"
    model = ensure_model(options.model, "wide-450m")
    result = asyncio.run(measure(options, model))
    write_result(result, None)
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
