"""The bad network of ``make chaos``: it is slow, and cuts what it is to cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos import slow_link
from tests.chaos.slow_link import DELAY_S, PIECE_BYTES, SlowLink

ANSWER = bytes(range(256)) * 40


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    """Of a server that answers a line with the same bytes, and goes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(ANSWER)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def ask(port: int) -> bytes:
    """What comes, until it ends or is cut off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"please\n")
    got = b""
    try:
        while piece := await reader.read(PIECE_BYTES):
            got += piece
    except ConnectionResetError:
        pass
    writer.close()
    return got


async def test_it_carries_everything_late(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_link, "CUT_SHARE", 0.0)
    link = SlowLink(port, seed=0)
    started = time.monotonic()
    assert await ask(link.port) == ANSWER
    assert time.monotonic() - started >= DELAY_S * (len(ANSWER) / PIECE_BYTES)
    link.close()
    assert link.num_cut == 0


async def test_it_cuts_in_the_middle(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_link, "CUT_SHARE", 1.0)
    link = SlowLink(port, seed=0)
    got = await ask(link.port)
    assert ANSWER.startswith(got)
    assert len(got) < len(ANSWER)
    link.close()
    assert link.num_cut == 1


async def test_nobody_behind_it_is_a_cut_connection() -> None:
    link = SlowLink(1, seed=0)
    assert await ask(link.port) == b""
    link.close()
