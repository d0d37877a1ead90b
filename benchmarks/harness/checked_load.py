"""Closed-loop clients that look into every answer: what is not answered in full has failed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

from benchmarks.harness.http_load import Answer, Connection, request_bytes

NUM_PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupShape:
    """What every request asks for, and every answer has to have."""

    n: int
    num_tokens: int
    """Of each sample, to the token: the end-of-sequence token does not end it."""

    @property
    def num_group_tokens(self) -> int:
        return self.n * self.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one request."""

    ended_s: float
    """Since the load began."""
    latency_s: float
    engine_ids: tuple[str, ...]
    """Who made the samples."""
    fault: str | None
    """What is wrong with the answer; None: it is whole."""


def group_request(number: int, shape: GroupShape, vocab_size: int) -> bytes:
    """One group, with a prompt of its own; the same number is the same work."""
    prompt = [
        (104_729 * (number + 1) + 7_919 * column) % vocab_size
        for column in range(NUM_PROMPT_TOKENS)
    ]
    body = {
        "prompts": [{"prompt_token_ids": prompt}],
        "n": shape.n,
        "sampling": {
            "temperature": 1.0,
            "max_tokens": shape.num_tokens,
            "ignore_eos": True,
            "seed": number,
        },
    }
    return request_bytes("/v1/rollouts", json.dumps(body).encode())


def fault_of(status: int, body: Any, shape: GroupShape) -> str | None:
    """What is wrong with an answer; None if it is one group with all samples in full."""
    if status != 200:
        return f"status {status}"
    groups = body["groups"]
    if len(groups) != 1:
        return f"{len(groups)} groups instead of 1"
    samples = groups[0]["samples"]
    if [sample["sample_index"] for sample in samples] != list(range(shape.n)):
        return f"samples {[sample['sample_index'] for sample in samples]} instead of {shape.n}"
    for sample in samples:
        num_tokens, reason = len(sample["token_ids"]), sample["finish_reason"]
        if num_tokens != shape.num_tokens or reason != "length":
            return f"{num_tokens} tokens instead of {shape.num_tokens}, finish_reason {reason!r}"
    return None


async def checked_loop(
    port: int, requests: Iterator[bytes], shape: GroupShape, *, concurrency: int
) -> list[Outcome]:
    """``concurrency`` requests under way until there are no more; every outcome, as they came."""
    outcomes: list[Outcome] = []
    began_s = monotonic()

    async def one_after_the_other() -> None:
        async with Connection(port) as connection:
            for request in requests:
                sent_s = monotonic()
                fault: str | None = None
                engine_ids: tuple[str, ...] = ()
                try:
                    answer = await connection.send(request)
                except (OSError, EOFError) as exc:
                    fault = f"no answer: {exc!r}"
                else:
                    fault, engine_ids = look_at(answer, shape)
                now_s = monotonic()
                outcomes.append(
                    Outcome(
                        ended_s=now_s - began_s,
                        latency_s=now_s - sent_s,
                        engine_ids=engine_ids,
                        fault=fault,
                    )
                )

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(one_after_the_other())
    return outcomes


def look_at(answer: Answer, shape: GroupShape) -> tuple[str | None, tuple[str, ...]]:
    """The fault of an answer, and who made its samples."""
    body = json.loads(answer.body) if answer.status == 200 else None
    fault = fault_of(answer.status, body, shape)
    if fault is not None or body is None:
        return fault, ()
    samples = body["groups"][0]["samples"]
    return None, tuple(sorted({sample["engine_id"] for sample in samples}))
