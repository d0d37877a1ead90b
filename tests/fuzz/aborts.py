"""Clients that leave in the middle, by the thousand: nothing may stay behind on the server."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.http_load import Connection, request_bytes
from benchmarks.harness.modelled_engine import EngineTimes
from benchmarks.harness.modelled_server import ModelledServer
from shared import metrics as names
from tests.fuzz.scraped import metric_value, scrape

TIMES = EngineTimes(step_s=0.005, max_num_seqs=64)
SETTINGS: dict[str, Any] = {
    "server": {"result_store_mib": 1, "status_poll_s": 0.1, "limits": {"max_n": 16}}
}
CONCURRENCY = 16
LONGEST_STAY_S = 0.1
MAX_TOKENS = 400
"""Two seconds of steps: nothing ends before its client leaves."""
RELEASE_TIMEOUT_S = 120.0
"""A slow machine has to get through what has come in first; ``release_s`` says how long it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortCounts:
    """What was done, and what was left."""

    aborted: int
    left_pending: float
    left_reserved: int
    left_running: int
    kv_cache_usage: float
    release_s: float
    """The longest it took after a thousand until all of that was 0."""
    rss_mb: tuple[float, ...]
    """After every thousand, the first thousand being the warm-up."""

    @property
    def rss_mb_per_1000(self) -> float:
        """Slope of a straight line through ``rss_mb``."""
        if len(self.rss_mb) < 2:
            return 0.0
        return statistics.linear_regression(range(len(self.rss_mb)), self.rss_mb).slope

    @property
    def nothing_stayed(self) -> bool:
        """Neither samples nor room nor KV."""
        left = (self.left_pending, self.left_reserved, self.left_running, self.kv_cache_usage)
        return not any(left)


def abortable_request(draw: random.Random) -> bytes:
    """One of the ways to ask for samples, without a name by which to ask again."""
    path = draw.choice(["/v1/rollouts", "/v1/completions", "/v1/chat/completions"])
    body: dict[str, Any] = {"n": draw.randint(1, 8), "stream": draw.random() < 0.5}
    if path == "/v1/rollouts":
        body |= {
            "prompts": [{"prompt": f"{draw.random()}"}],
            "sampling": {"max_tokens": MAX_TOKENS},
        }
    elif path == "/v1/completions":
        body |= {"model": "modelled", "prompt": "2+3=", "max_tokens": MAX_TOKENS}
    else:
        message = {"role": "user", "content": "2+3?"}
        body |= {"model": "modelled", "messages": [message], "max_tokens": MAX_TOKENS}
    return request_bytes(path, json.dumps(body).encode())


async def ask_and_leave(port: int, count: int, draw: random.Random) -> None:
    """``count`` clients, several at once, each gone after up to ``LONGEST_STAY_S``."""
    numbers = iter(range(count))

    async def one_after_the_other() -> None:
        for _ in numbers:
            connection = Connection(port)
            asking = asyncio.create_task(connection.send(abortable_request(draw)))
            await asyncio.sleep(draw.random() * LONGEST_STAY_S)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            connection.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONCURRENCY):
            tasks.create_task(one_after_the_other())


async def left_behind(port: int) -> tuple[float, int, int, float]:
    """Pending samples; samples reserved, sequences running and KV in use over all engines."""
    text = await scrape(port)
    async with Connection(port) as connection:
        answer = await connection.send(request_bytes("/v1/engines", b"", method="GET"))
    engines = json.loads(answer.body)["engines"]
    return (
        metric_value(text, names.PENDING_SAMPLES),
        sum(engine["num_reserved"] for engine in engines),
        sum(engine["num_running_reqs"] + engine["num_waiting_reqs"] for engine in engines),
        sum(engine["kv_cache_usage"] for engine in engines),
    )


async def abort_many(server: ModelledServer, count: int, rounds: int, seed: int) -> AbortCounts:
    """``count`` as the warm-up, then ``rounds`` times ``count``; then look what has stayed."""
    draw = random.Random(seed)
    rss_mb: list[float] = []
    release_s = 0.0
    left: tuple[float, int, int, float] = (0.0, 0, 0, 0.0)
    for _ in range(rounds + 1):
        await ask_and_leave(server.port, count, draw)
        began_s = time.monotonic()
        left = await _released(server.port)
        release_s = max(release_s, time.monotonic() - began_s)
        rss_mb.append(server.rss_bytes() / 1e6)
    return AbortCounts(
        aborted=count * (rounds + 1),
        left_pending=left[0],
        left_reserved=left[1],
        left_running=left[2],
        kv_cache_usage=left[3],
        release_s=release_s,
        rss_mb=tuple(rss_mb[1:]),
    )


async def _released(port: int) -> tuple[float, int, int, float]:
    """What is left once nothing is, or when ``RELEASE_TIMEOUT_S`` is over."""
    deadline_s = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        left = await left_behind(port)
        if not any(left) or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(0.1)
