"""Engines are added and drained while clients go on: who served when, and what failed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psutil

from benchmarks.harness.checked_load import GroupShape, Outcome, checked_loop, group_request
from benchmarks.harness.http_load import Connection, request_bytes

POLL_S = 0.25
SCALE_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 30.0
BOOKS = ("samples_accepted_total", "samples_delivered_total", "samples_unaccounted")


class EngineControl:
    """The routes an operator uses, on a server in this host."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask_for(self, count: int) -> None:
        """``PUT /v1/engines``: returns as soon as the server has heard it."""
        await self._send("PUT", "/v1/engines", json.dumps({"count": count}).encode())

    async def states(self) -> Counter[str]:
        """How many engines there are in each state."""
        engines = json.loads(await self._send("GET", "/v1/engines"))["engines"]
        return Counter(engine["state"] for engine in engines)

    async def scale(self, count: int) -> float:
        """Until exactly this many serve and no other is left; seconds it took.

        Raises:
            TimeoutError: after ``SCALE_TIMEOUT_S``, with the states there are.
        """
        started_s = monotonic()
        await self.ask_for(count)
        while (states := await self.states()) != {"serving": count}:
            if monotonic() - started_s > SCALE_TIMEOUT_S:
                raise TimeoutError(
                    f"waited {SCALE_TIMEOUT_S:g} s for {count} engines to serve: {dict(states)}"
                )
            await asyncio.sleep(POLL_S)
        return monotonic() - started_s

    async def confine(self) -> None:
        """Keep every thread of every engine on the engine's core; vLLM binds those that compute,
        and the others would run wherever a core is idle."""
        for pid, core in await self._engine_cores():
            actor = psutil.Process(pid)
            for process in (actor, *actor.children(recursive=True)):
                for thread in process.threads():
                    with contextlib.suppress(ProcessLookupError):  # it has ended
                        os.sched_setaffinity(thread.id, {core})

    async def _engine_cores(self) -> list[tuple[int, int]]:
        """Pid and core of every engine; an engine serves a moment before its status has its pid."""
        deadline_s = monotonic() + STATUS_TIMEOUT_S
        while True:
            engines = json.loads(await self._send("GET", "/v1/engines"))["engines"]
            if all(engine["pid"] is not None for engine in engines):
                return [(engine["pid"], int(engine["cpu_cores"])) for engine in engines]
            if monotonic() > deadline_s:
                raise TimeoutError(f"waited {STATUS_TIMEOUT_S:g} s for every engine's pid")
            await asyncio.sleep(POLL_S)

    async def books(self) -> dict[str, float]:
        """The server's own count of samples."""
        text = (await self._send("GET", "/metrics")).decode()
        found = {}
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name.removeprefix("slipstream_") in BOOKS:
                found[name.removeprefix("slipstream_")] = float(value)
        return found

    async def _send(self, method: str, path: str, body: bytes = b"") -> bytes:
        async with Connection(self._port) as connection:
            answer = await connection.send(request_bytes(path, body, method=method))
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: status {answer.status}, {answer.body[:500]!r}")
        return answer.body


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticPlan:
    """How many engines, one count after the other, and for how long."""

    counts: Sequence[int]
    """The first is what the server has."""
    hold_s: float
    """Between a count that is reached and the next."""
    concurrency: int
    shape: GroupShape
    vocab_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticRun:
    """What was seen."""

    outcomes: list[Outcome]
    states: list[tuple[float, Counter[str]]]
    """Engines by state, looked at every ``POLL_S``."""
    steps: list[dict[str, float]]
    """``count``, when it was asked for (``asked_s``) and how long it took (``took_s``)."""
    books: dict[str, float]
    """By how much the server's own counts have grown."""


async def run_elastic(port: int, plan: ElasticPlan) -> ElasticRun:
    """Closed-loop clients from the first count to the last."""
    control = EngineControl(port)
    stop = asyncio.Event()
    before = await control.books()
    began_s = monotonic()
    clients = asyncio.create_task(
        checked_loop(port, _until(stop, plan), plan.shape, concurrency=plan.concurrency)
    )
    states: list[tuple[float, Counter[str]]] = []
    watching = asyncio.create_task(_watch(control, lambda: monotonic() - began_s, states))
    steps = []
    try:
        await asyncio.sleep(plan.hold_s)
        for count in plan.counts[1:]:
            asked_s = monotonic() - began_s
            took_s = await control.scale(count)
            steps.append({"count": count, "asked_s": asked_s, "took_s": took_s})
            await asyncio.sleep(plan.hold_s)
        stop.set()
        outcomes = await clients
        if watching.done():
            watching.result()  # it ended early: with an error, which is raised here
    finally:
        for task in (clients, watching):
            task.cancel()
        await asyncio.gather(clients, watching, return_exceptions=True)
    after = await control.books()
    books = {name: after[name] - before[name] for name in BOOKS}
    return ElasticRun(outcomes=outcomes, states=states, steps=steps, books=books)


def _until(stop: asyncio.Event, plan: ElasticPlan) -> Iterator[bytes]:
    for number in itertools.count():
        if stop.is_set():
            return
        yield group_request(number, plan.shape, plan.vocab_size)


async def _watch(
    control: EngineControl, clock: Callable[[], float], states: list[tuple[float, Counter[str]]]
) -> None:
    while True:
        found = await control.states()
        states.append((clock(), found))
        await asyncio.sleep(POLL_S)


def timeline(run: ElasticRun, interval_s: float) -> list[dict[str, Any]]:
    """A row per interval: engines that served at its end, groups that came, those that failed."""
    last_s = max(outcome.ended_s for outcome in run.outcomes)
    rows: list[dict[str, Any]] = []
    for number in range(int(last_s // interval_s) + 1):
        start_s, end_s = number * interval_s, (number + 1) * interval_s
        seen = [found for at_s, found in run.states if at_s < end_s]
        ended = [o for o in run.outcomes if start_s <= o.ended_s < end_s]
        rows.append(
            {
                "t_s": round(end_s, 3),
                "engines": dict(seen[-1]) if seen else {},
                "groups": sum(outcome.fault is None for outcome in ended),
                "failed": sum(outcome.fault is not None for outcome in ended),
                "engines_that_answered": len({e for o in ended for e in o.engine_ids}),
                "asked_for": [s["count"] for s in run.steps if start_s <= s["asked_s"] < end_s],
            }
        )
    return rows


def elastic_figures(run: ElasticRun, shape: GroupShape) -> dict[str, Any]:
    """What the run comes to; a sample that the server's books do not have is a failure too."""
    faults = Counter(outcome.fault for outcome in run.outcomes if outcome.fault is not None)
    num_whole = len(run.outcomes) - faults.total()
    delivered = run.books["samples_delivered_total"]
    return {
        "failed_requests": faults.total(),
        "faults": dict(faults),
        "requests": len(run.outcomes),
        "engines_that_answered": len({e for o in run.outcomes for e in o.engine_ids}),
        "longest_latency_s": round(max(outcome.latency_s for outcome in run.outcomes), 2),
        "steps": [
            {"count": int(step["count"]), "took_s": round(step["took_s"], 1)} for step in run.steps
        ],
        "samples_of_whole_answers": num_whole * shape.n,
        "samples_accepted": int(run.books["samples_accepted_total"]),
        "samples_delivered": int(delivered),
        "samples_unaccounted": int(run.books["samples_unaccounted"]),
    }
