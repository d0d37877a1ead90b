"""A bad network between a client and a server: slow, late, and cut off now and then."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from typing import Any

DELAY_S = 0.05
"""Of every piece, either way."""
PIECE_BYTES = 1024
CUT_SHARE = 0.1
"""Of the connections: each of these ends in the middle of some answer, with a reset."""
START_TIMEOUT_S = 10.0


class SlowLink:
    """A forwarding port on loopback, in a thread of its own, from construction to ``close``."""

    def __init__(self, port: int, seed: int) -> None:
        self._upstream = port
        self._random = random.Random(seed)
        self.num_cut = 0
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(),), daemon=True
        )
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S), "waited 10 s for a port to listen on"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_TIMEOUT_S)

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:  # the server is being started again
            to_client.transport.abort()
            return
        is_cut = self._random.random() < CUT_SHARE
        num_pieces = self._random.randint(1, 4) if is_cut else None
        ways: tuple[Coroutine[Any, Any, bool], ...] = (
            _carry(client, to_server, None),
            _carry(server, to_client, num_pieces),
        )
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the link is closed; asyncio's streams would complain of it
            return
        for task in waiting:
            task.cancel()
        was_cut = any(task.result() for task in done)
        self.num_cut += was_cut
        for writer in (to_server, to_client):
            if was_cut:
                writer.transport.abort()
            else:  # what is still on its way arrives
                writer.close()


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, num_pieces: int | None
) -> bool:
    """One way, until it ends. True where that is because so many pieces were let through."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            await asyncio.sleep(DELAY_S)
            if num_pieces == 0:
                return True
            num_pieces = None if num_pieces is None else num_pieces - 1
            writer.write(piece)
            await writer.drain()
    return False
