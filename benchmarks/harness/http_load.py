"""A cheap HTTP/1.1 client for load: the cores are for the server.

Bodies are encoded before the clock starts, connections are kept, and of an answer only status,
headers and length are read. One that wants what is inside takes ``Answer.body``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Self

ANSWER_TIMEOUT_S = 120.0
DROPPED = 0
"""Stands for a status where there was no answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Of a server."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One kept connection; opened on first use, and anew after the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    async def send(self, request: bytes) -> Answer:
        """One request, one whole answer.

        Raises:
            OSError, EOFError: no connection, or one that ended before its answer.
        """
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert self._reader is not None
        try:
            self._writer.write(request)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await _read_answer(self._reader)
        except BaseException:  # whatever it is, then passed on
            self.close()  # in the middle of an answer: of no use to the next
            raise
        if answer.headers.get("connection", "").lower() == "close":
            self.close()
        return answer

    def close(self) -> None:
        """Without a farewell: what is under way on the server loses its client."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._reader = self._writer = None


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split(" ", 2)[1])
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    if "content-length" in headers:
        return Answer(
            status=status,
            headers=headers,
            body=await reader.readexactly(int(headers["content-length"])),
        )
    if headers.get("transfer-encoding") != "chunked":
        return Answer(status=status, headers=headers, body=await reader.read())
    chunks = []
    while size := int((await reader.readuntil(b"\r\n")), 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return Answer(status=status, headers=headers, body=b"".join(chunks))


def request_bytes(
    path: str,
    body: bytes,
    *,
    method: str = "POST",
    content_type: str = "application/json",
    key: str | None = None,
) -> bytes:
    """A whole request, ready to be sent."""
    authorization = "" if key is None else f"Authorization: Bearer {key}\r\n"
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass(kw_only=True, slots=True)
class Load:
    """What a stretch of load came to."""

    elapsed_s: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    """Of answers with status 200."""
    num_retry_after: int = 0
    """Answers with status 429 that said when to come again."""

    @property
    def ok_per_s(self) -> float:
        return self.statuses[200] / self.elapsed_s

    def note(self, answer: Answer, latency_s: float) -> None:
        self.statuses[answer.status] += 1
        if answer.status == 200:
            self.latencies_s.append(latency_s)
        elif answer.status == 429 and "retry-after" in answer.headers:
            self.num_retry_after += 1


async def closed_loop(
    port: int,
    requests: Sequence[bytes],
    *,
    concurrency: int,
    duration_s: float,
    count_from_s: float = 0.0,
) -> Load:
    """As many requests under way as ``concurrency``, each followed by the next.

    Answers before ``count_from_s`` do not count, and ``elapsed_s`` is what follows.
    """
    load = Load()
    started_s = monotonic()
    position = 0

    async def one_after_the_other() -> None:
        nonlocal position
        async with Connection(port) as connection:
            while monotonic() - started_s < duration_s:
                request = requests[position % len(requests)]
                position += 1
                sent_s = monotonic()
                answer = await connection.send(request)
                now_s = monotonic()
                if count_from_s <= now_s - started_s <= duration_s:
                    load.note(answer, now_s - sent_s)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one_after_the_other())
    load.elapsed_s = duration_s - count_from_s
    return load


async def open_loop(
    port: int,
    next_request: Callable[[int], bytes],
    *,
    rate_per_s: float,
    duration_s: float,
    count_from_s: float = 0.0,
    while_running: Callable[[], None] = lambda: None,
) -> Load:
    """Requests at a fixed rate, whether or not earlier ones have been answered.

    Ends when the last is answered. Only answers between ``count_from_s`` and ``duration_s`` count,
    so that ``ok_per_s`` is goodput under the load.

    Args:
        while_running: called about ten times a second.
    """
    load = Load()
    idle: list[Connection] = []
    tasks: set[asyncio.Task[None]] = set()
    started_s = monotonic()

    async def one(number: int) -> None:
        connection = idle.pop() if idle else Connection(port)
        sent_s = monotonic()
        try:
            answer = await connection.send(next_request(number))
        except (OSError, EOFError, asyncio.IncompleteReadError):
            load.statuses[DROPPED] += 1
            return
        idle.append(connection)
        now_s = monotonic()
        if count_from_s <= now_s - started_s <= duration_s:
            load.note(answer, now_s - sent_s)

    num_sent = 0
    async with _called_repeatedly(while_running):
        while (now_s := monotonic() - started_s) < duration_s:
            while num_sent < math.floor(now_s * rate_per_s):
                task = asyncio.create_task(one(num_sent))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                num_sent += 1
            await asyncio.sleep(0.002)
        load.elapsed_s = duration_s - count_from_s
        await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return load


@contextlib.asynccontextmanager
async def _called_repeatedly(function: Callable[[], None]) -> AsyncIterator[None]:
    async def call() -> None:
        while True:
            function()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(call())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
