"""The same work given to one engine in two ways: through the whole server, and in its own process.

This process is the server as ``rollout_server.launch`` builds it, with Ray and a real engine. The
client is ``shared.client`` in a process of its own (``python -m``, a JSON line per task). The
engine's side of the comparison runs inside the engine's actor: nothing between it and vLLM.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import ensure_model
from rollout_server.engine.protocol import GenerateRequest
from rollout_server.http_server import http_server, serve_quietly
from rollout_server.launch import running_service
from rollout_server.listener import bound_socket
from shared.api_keys import ApiKeys
from shared.client import AsyncRolloutClient, rollout_request
from shared.config.loading import validate_run_config
from shared.config.run import RunConfig
from shared.schemas.rollouts import SamplingOptions

PRESET = "medium-160m"
POLL_S = 0.05
NUM_PROMPT_TOKENS = 32
LATENCY_TOKENS = 4
"""Few, so that what HTTP adds is not lost in the spread of long generations."""
LATENCY_REQUESTS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """What to measure."""

    model: Path
    repeats: int
    num_groups: int
    num_tokens: int
    n: int = 4
    concurrency: int = 8
    """Groups under way at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Groups to generate, ``concurrency`` at once; the same for both sides."""

    name: str
    prompts: list[list[int]]
    n: int
    num_tokens: int
    concurrency: int

    def sampling(self, index: int) -> SamplingOptions:
        return SamplingOptions(
            temperature=1.0, max_tokens=self.num_tokens, ignore_eos=True, seed=index
        )


Outcome = dict[str, Any]
"""``elapsed_s``, ``num_tokens`` and ``latencies_s``."""


async def run_task(task: Task, generate: Callable[[int], Awaitable[int]]) -> Outcome:
    """``generate`` runs one group by its number and says how many tokens came."""
    numbers = iter(range(len(task.prompts)))
    latencies_s: list[float] = []
    num_tokens = 0

    async def one_after_the_other() -> None:
        nonlocal num_tokens
        for number in numbers:
            began_s = time.perf_counter()
            num_group_tokens = await generate(number)  # awaited first: others add meanwhile
            num_tokens += num_group_tokens
            latencies_s.append(time.perf_counter() - began_s)

    started_s = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(task.concurrency)))
    return {
        "elapsed_s": time.perf_counter() - started_s,
        "num_tokens": num_tokens,
        "latencies_s": latencies_s,
    }


def engine_loop(actor: Any) -> asyncio.AbstractEventLoop:
    """The event loop an engine generates on: that of ``AsyncLLM.output_handler`` (vLLM 0.32.0)."""
    loop: asyncio.AbstractEventLoop = actor._llm.output_handler.get_loop()
    return loop


def begin_inside(
    actor: Any,
    task: Task,
    loop_of: Callable[[Any], asyncio.AbstractEventLoop] = engine_loop,
) -> None:
    """Runs in the engine's process: start the task on its event loop.

    Ray calls a function like this one on a thread without a loop.
    """

    async def generate(number: int) -> int:
        result = await actor.generate(
            GenerateRequest(
                request_id=f"{task.name}-{number}",
                prompt_token_ids=task.prompts[number],
                n=task.n,
                sampling=task.sampling(number),
            )
        )
        return sum(len(sample.token_ids) for sample in result.samples)

    actor.benchmark_task = asyncio.run_coroutine_threadsafe(
        run_task(task, generate), loop_of(actor)
    )


def outcome_inside(actor: Any) -> Outcome | None:
    """Runs in the engine's process: the outcome, once it is there."""
    task: concurrent.futures.Future[Outcome] = actor.benchmark_task
    return task.result() if task.done() else None


async def engine_side(actor: Any, task: Task) -> Outcome:
    """The task in the engine's own process. Looking for its end costs that process nearly nothing
    and is not part of the time, which is measured inside."""
    await actor.__ray_call__.remote(begin_inside, task)
    while True:
        outcome: Outcome | None = await actor.__ray_call__.remote(outcome_inside)
        if outcome is not None:
            return outcome
        await asyncio.sleep(POLL_S)


class ClientProcess:
    """A trainer's side of the wire."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.harness.engine_over_http", self._url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )

    async def run(self, task: Task) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        fields = {name: getattr(task, name) for name in Task.__slots__}
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client's process has ended; its last lines are above")
        outcome: Outcome = json.loads(line)
        return outcome

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def serve_tasks(url: str) -> None:
    """The client's process: a task per line of stdin, its outcome on stdout."""
    async with AsyncRolloutClient(url) as client:
        await client.wait_until_ready()
        while line := await asyncio.to_thread(sys.stdin.readline):
            task = Task(**json.loads(line))

            async def generate(number: int, task: Task = task) -> int:
                response = await client.rollout(
                    rollout_request(
                        [task.prompts[number]], n=task.n, sampling=task.sampling(number)
                    )
                )
                return response.usage.num_completion_tokens

            print(json.dumps(await run_task(task, generate)), flush=True)


def tasks_of(plan: EnginePlan, repeat: int, vocab_size: int) -> tuple[Task, Task]:
    """A batch, and single small groups one after the other; new prompts in every repeat."""

    def prompts(count: int, salt: int) -> list[list[int]]:
        return [
            [
                (7919 * (repeat + 1) + 104729 * salt + 31 * row + 17 * column) % vocab_size
                for column in range(NUM_PROMPT_TOKENS)
            ]
            for row in range(count)
        ]

    batch = Task(
        name=f"batch-{repeat}",
        prompts=prompts(plan.num_groups, 1),
        n=plan.n,
        num_tokens=plan.num_tokens,
        concurrency=plan.concurrency,
    )
    single = Task(
        name=f"single-{repeat}",
        prompts=prompts(LATENCY_REQUESTS, 2),
        n=1,
        num_tokens=LATENCY_TOKENS,
        concurrency=1,
    )
    return batch, single


def run_config(plan: EnginePlan, model: Path, directory: str) -> RunConfig:
    """No drafter: what HTTP costs shows most beside the fastest engine."""
    return validate_run_config(
        {
            "name": "bench-http",
            "output_dir": directory,
            "model": {"path": str(model), "dtype": "bfloat16", "max_model_len": 1024},
            "engine": {
                "kv_cache_memory_mib": 512,
                "max_num_seqs": plan.n * plan.concurrency,
                "enable_prefix_caching": False,
            },
            "drafter": {"enabled": False},
            "speculation": {"mode": "off"},
        }
    )


async def compare_with_engine(plan: EnginePlan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and the rounds behind them, after one uncounted repeat."""
    model = ensure_model(plan.model, PRESET)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-http-") as directory:
        config = run_config(plan, model, directory)
        async with running_service(config) as (service, _):
            with bound_socket("127.0.0.1", 0) as listener:
                server = http_server(service, ApiKeys())
                serving = asyncio.create_task(serve_quietly(server, listener))
                client = ClientProcess(f"http://127.0.0.1:{listener.getsockname()[1]}")
                await client.start()
                (handle,) = service._pool.engines()
                actor = handle._actor  # type: ignore[attr-defined]  # Ray's, of RayEngineHandle
                for repeat in range(plan.repeats + 1):
                    tasks = tasks_of(plan, repeat, service.model.vocab_size)
                    outcome = await one_round(tasks, actor, client, http_first=repeat % 2 == 0)
                    if repeat > 0:
                        rounds.append(outcome)
                    print(f"repeat {repeat}/{plan.repeats}: {outcome}", file=sys.stderr)
                await client.stop()
                await service.dashboard.close()
                server.should_exit = True
                await serving
    return summarize(rounds), rounds


async def one_round(
    tasks: Sequence[Task], actor: Any, client: ClientProcess, *, http_first: bool
) -> dict[str, Any]:
    """Both tasks on both sides."""
    found: dict[str, Any] = {}
    for task, kind in zip(tasks, ("batch", "single"), strict=True):
        for side in ("http", "engine") if http_first else ("engine", "http"):
            outcome = await (client.run(task) if side == "http" else engine_side(actor, task))
            found[f"{kind}_{side}_tokens_per_s"] = outcome["num_tokens"] / outcome["elapsed_s"]
            found[f"{kind}_{side}_latency_ms"] = statistics.median(outcome["latencies_s"]) * 1000
    return found


def summarize(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios and differences within a repeat, then their medians."""
    ratios = [r["batch_http_tokens_per_s"] / r["batch_engine_tokens_per_s"] for r in rounds]
    added_ms = [r["single_http_latency_ms"] - r["single_engine_latency_ms"] for r in rounds]
    return {
        "throughput_ratio": round(statistics.median(ratios), 4),
        "throughput_ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "added_latency_ms_p50": round(statistics.median(added_ms), 2),
        "added_latency_ms_spread": [round(min(added_ms), 2), round(max(added_ms), 2)],
        **{
            name: round(statistics.median(r[name] for r in rounds), 2)
            for name in ("batch_http_tokens_per_s", "batch_engine_tokens_per_s",
                         "single_engine_latency_ms")
        },
    }  # fmt: skip


if __name__ == "__main__":
    asyncio.run(serve_tasks(sys.argv[1]))
