"""Sends raw bodies and broken requests to a running server, and counts what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.harness.http_load import Connection, request_bytes
from shared.schemas.base import ErrorResponse
from tests.fuzz.raw_bodies import RawRequest, raw_requests, raw_streams

CONCURRENCY = 16
STREAM_ANSWER_S = 10.0
"""Longest wait for the answer to a broken request, or for the end of its connection."""
MAX_SHOWN = 20


@dataclass(kw_only=True, slots=True)
class RawCounts:
    """What came of it."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers of 500 and above, and errors of another shape than promised."""

    def note(self, request: RawRequest, status: int, body: bytes) -> None:
        """One answer."""
        self.sent += 1
        self.statuses[status] += 1
        problem = None
        if status >= 500 and status != 503:
            problem = f"status {status}"
        elif status >= 400:
            try:
                ErrorResponse.model_validate_json(body)
            except ValueError:
                problem = f"status {status} with another body than an error's"
        if problem is not None and len(self.wrong) < MAX_SHOWN:
            self.wrong.append(
                f"{problem}: {request.method} {request.path} {request.content_type} "
                f"{request.body[:300]!r} -> {body[:300]!r}"
            )


async def send_raw_bodies(port: int, count: int, seed: int, key: str | None = None) -> RawCounts:
    """``count`` bodies, several at once.

    Raises:
        OSError, EOFError: the server is gone.
    """
    counts = RawCounts()
    requests = itertools.islice(raw_requests(seed), count)

    async def one_after_the_other() -> None:
        async with Connection(port) as connection:
            for request in requests:
                answer = await connection.send(
                    request_bytes(
                        request.path,
                        request.body,
                        method=request.method,
                        content_type=request.content_type,
                        key=key,
                    )
                )
                counts.note(request, answer.status, answer.body)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONCURRENCY):
            tasks.create_task(one_after_the_other())
    return counts


async def send_raw_streams(port: int, count: int, seed: int) -> Counter[str]:
    """``count`` broken requests, each on a connection of its own; first words of the answers."""
    answers: Counter[str] = Counter()
    streams = itertools.islice(raw_streams(seed), count)

    async def one_after_the_other() -> None:
        for stream in streams:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                writer.write(stream)
                await writer.drain()
                writer.write_eof()  # or the server would wait for what is missing
            answer = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(STREAM_ANSWER_S):
                    answer = await reader.read(100)
            writer.transport.abort()
            answers[answer[:12].decode("latin-1")] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONCURRENCY):
            tasks.create_task(one_after_the_other())
    return answers
