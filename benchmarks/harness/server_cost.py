"""The server alone: requests per second over engines that answer at once, and CPU time by part."""

from __future__ import annotations

import asyncio
import json
import statistics
from typing import Any

from benchmarks.harness.http_load import Load, closed_loop, request_bytes
from benchmarks.harness.modelled_server import ModelledServer

CONCURRENCY = 32
NUM_BODIES = 256
PROMPT_CHARACTERS = 128
SETTINGS: dict[str, Any] = {"server": {"result_store_mib": 32}, "scoring": {"num_workers": 1}}
WARM_UP_S = 1.0
REST = "HTTP and event loop"


def group_requests(n: int, num_tokens: int, reward: str | None) -> list[bytes]:
    """Requests of one group each, without ids of their own, so that any number can be sent."""
    requests = []
    for index in range(NUM_BODIES):
        body = {
            "prompts": [
                {
                    "prompt": f"{index}: what is {index} times 17? ".ljust(PROMPT_CHARACTERS, "."),
                    "answer": str(index * 17),
                    "metadata": {"row": index},
                }
            ],
            "n": n,
            "sampling": {"temperature": 1.0, "max_tokens": num_tokens, "seed": index},
            "reward": None if reward is None else {"name": reward},
        }
        requests.append(request_bytes("/v1/rollouts", json.dumps(body).encode()))
    return requests


def measure_requests_per_s(
    *, n: int, num_tokens: int, reward: str | None, repeats: int, duration_s: float
) -> list[dict[str, float]]:
    """One server, ``repeats`` stretches of load. CPU time is the server's with its workers."""
    requests = group_requests(n, num_tokens, reward)
    rounds = []
    with ModelledServer(settings=SETTINGS) as server:
        _load(server, requests, WARM_UP_S)
        for _ in range(repeats):
            cpu_s = server.cpu_s() + server.workers_cpu_s()
            load = _load(server, requests, duration_s)
            cpu_s = server.cpu_s() + server.workers_cpu_s() - cpu_s
            latencies = sorted(load.latencies_s)
            rounds.append(
                {
                    "requests_per_s": load.ok_per_s,
                    "cpu_ms": cpu_s / load.statuses[200] * 1000,
                    "latency_ms_p50": statistics.median(latencies) * 1000,
                    "latency_ms_p99": latencies[int(len(latencies) * 0.99)] * 1000,
                }
            )
    return rounds


def measure_cpu_parts(
    *, n: int, num_tokens: int, reward: str | None, duration_s: float
) -> dict[str, float]:
    """CPU milliseconds of a request by part, on a server whose parts are timed.

    ``total`` is of the whole process with its reward workers; what no part claims is uvicorn,
    starlette, middleware and the event loop, clocks included.
    """
    requests = group_requests(n, num_tokens, reward)
    with ModelledServer(settings=SETTINGS, measures_cpu=True) as server:
        cpu_s, workers_s = server.cpu_s(), server.workers_cpu_s()
        load = _load(server, requests, duration_s)
        cpu_s, workers_s = server.cpu_s() - cpu_s, server.workers_cpu_s() - workers_s
        parts = server.stop_and_get_cpu_parts()
    num_requests = load.statuses[200]
    total_ms = (cpu_s + workers_s) / num_requests * 1000
    milliseconds = {name: seconds / num_requests * 1000 for name, seconds in parts.items()}
    if reward is not None:
        milliseconds["reward workers"] = workers_s / num_requests * 1000
    milliseconds[REST] = total_ms - sum(milliseconds.values())
    return {
        "total": round(total_ms, 3),
        **{name: round(ms, 3) for name, ms in sorted(milliseconds.items(), key=lambda i: -i[1])},
    }


def _load(server: ModelledServer, requests: list[bytes], duration_s: float) -> Load:
    load = asyncio.run(
        closed_loop(server.port, requests, concurrency=CONCURRENCY, duration_s=duration_s)
    )
    others = set(load.statuses) - {200}
    assert not others, f"statuses {dict(load.statuses)}: {server.log()[-2000:]}"
    return load
