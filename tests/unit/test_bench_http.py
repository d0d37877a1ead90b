"""The two sides of ``make bench-http`` give the same work to an engine, and how it is judged."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.harness.bars import judged
from benchmarks.harness.engine_over_http import (
    ClientProcess,
    EnginePlan,
    begin_inside,
    outcome_inside,
    summarize,
    tasks_of,
)
from benchmarks.harness.modelled_engine import VOCAB_SIZE, EngineTimes, ModelledEngine
from benchmarks.harness.modelled_server import ModelledServer
from benchmarks.http import BARS

PLAN = EnginePlan(model=Path("m"), repeats=1, num_groups=6, num_tokens=5, n=3, concurrency=2)


async def test_the_clients_side_and_the_engines_side_get_the_same_tokens() -> None:
    batch, single = tasks_of(PLAN, 1, VOCAB_SIZE)
    actor = ModelledEngine("a", EngineTimes())
    with ModelledServer() as server:
        client = ClientProcess(server.url)
        await client.start()
        for task in (batch, single):
            over_http = await client.run(task)
            # From a thread without a loop, as Ray does it.
            loop = asyncio.get_running_loop()
            await asyncio.to_thread(begin_inside, actor, task, lambda _, loop=loop: loop)
            while (inside := outcome_inside(actor)) is None:  # noqa: ASYNC110 - as the bench does
                await asyncio.sleep(0.001)
            assert over_http["num_tokens"] == inside["num_tokens"]
            assert len(over_http["latencies_s"]) == len(inside["latencies_s"]) == len(task.prompts)
        await client.stop()
    assert (batch.concurrency, single.concurrency) == (2, 1)


def test_every_repeat_has_prompts_of_its_own() -> None:
    prompts = [
        tuple(prompt) for repeat in range(3) for prompt in tasks_of(PLAN, repeat, 16_000)[0].prompts
    ]
    assert len(set(prompts)) == len(prompts)
    assert max(map(max, prompts)) < 16_000


def test_ratios_and_differences_are_taken_within_a_repeat() -> None:
    rounds = [
        {
            "batch_http_tokens_per_s": 97.0 * speed,
            "batch_engine_tokens_per_s": 100.0 * speed,
            "single_http_latency_ms": 83.0 * speed,
            "single_engine_latency_ms": 80.0 * speed,
        }
        for speed in (1.0, 2.0, 10.0)
    ]
    result = summarize(rounds)
    assert result["throughput_ratio"] == pytest.approx(0.97)
    assert result["added_latency_ms_p50"] == pytest.approx(6.0)


def test_what_was_not_measured_is_not_met() -> None:
    verdicts = judged(
        {"throughput_ratio": 0.96, "added_latency_ms_p50": 5.1, "fake_engine_requests_per_s": None},
        BARS,
    )
    assert [verdicts[name]["met"] for name in verdicts] == [True, False, False]
