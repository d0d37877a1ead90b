"""The server's port is its own from the moment it is bound, long before it listens."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from rollout_server.http_server import serve_quietly, until_listening
from rollout_server.listener import bound_socket, share_with_successors
from shared.errors import ConfigurationError, SlipstreamError


def reusing() -> socket.socket:
    """A socket of another program."""
    other = socket.socket()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return other


def test_nobody_else_takes_it_before_it_listens() -> None:
    with bound_socket("127.0.0.1", 0) as ours, reusing() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(ours.getsockname())
        ours.listen()


def test_two_servers_that_start_at_once_on_one_port() -> None:
    with bound_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"server.port {port}: Address already in use"):
            bound_socket("127.0.0.1", port)


def test_a_port_that_another_program_listens_on() -> None:
    with reusing() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigurationError, match="in use"):
            bound_socket("127.0.0.1", other.getsockname()[1])


def test_connections_of_an_earlier_server_do_not_keep_it_out() -> None:
    earlier = bound_socket("127.0.0.1", 0)
    share_with_successors(earlier)
    earlier.listen()
    address = earlier.getsockname()
    with socket.create_connection(address) as client:
        accepted, _ = earlier.accept()
        accepted.close()  # the first to close is the one that lingers
        earlier.close()
        assert client.recv(1) == b""
    with bound_socket("127.0.0.1", address[1]) as ours:
        ours.listen()
        with socket.create_connection(address):
            pass


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigurationError, match=r"server\.host '192\.0\.2\.1'"):
        bound_socket("192.0.2.1", 0)


async def test_what_is_accepted_sends_without_delay() -> None:
    """Else every answer of two pieces takes 40 ms longer."""
    found: list[int] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        found.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with bound_socket("127.0.0.1", 0) as ours:
        async with await asyncio.start_server(answer, sock=ours):
            reader, writer = await asyncio.open_connection(*ours.getsockname())
            assert await reader.read() == b""
            writer.close()
    assert found[0] != 0


class SlowServer(uvicorn.Server):
    """Takes a while to load what it serves, as ours does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.sleep(0.05)
        await super().startup(sockets)


class BrokenServer(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        raise OSError("no memory for sockets")


class EndedServer(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.should_exit = True


async def nothing(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
) -> None:
    """An application that nobody asks."""


def config() -> uvicorn.Config:
    return uvicorn.Config(nothing, lifespan="off", log_config=None)


async def test_whoever_hears_that_it_listens_can_connect() -> None:
    server = SlowServer(config())
    with bound_socket("127.0.0.1", 0) as ours:
        serving = asyncio.create_task(serve_quietly(server, ours))
        await until_listening(server, serving)
        _, writer = await asyncio.open_connection(*ours.getsockname())
        writer.close()
        server.should_exit = True
        await serving


async def test_a_server_that_will_never_listen_is_not_waited_for() -> None:
    for kind, message in ((BrokenServer, "no memory"), (EndedServer, "before it listened")):
        server = kind(config())
        with bound_socket("127.0.0.1", 0) as ours:
            serving = asyncio.create_task(serve_quietly(server, ours))
            with pytest.raises((OSError, SlipstreamError), match=message):
                await asyncio.wait_for(until_listening(server, serving), 5)
