"""The port the server listens on, held from before the slow start on."""

from __future__ import annotations

import errno
import socket

from shared.errors import ConfigurationError


def bound_socket(host: str, port: int) -> socket.socket:
    """Bound, so that a taken port is known at once; connections are refused until ``listen``.

    With ``SO_REUSEADDR`` any other program that sets it, too, may bind the same port and listen
    first, as long as this one does not listen: minutes, in which Ray opens ports of its own. So the
    port is taken without, unless connections of an earlier server still linger on it.

    Args:
        port: 0 for any.

    Raises:
        ConfigurationError: it is taken, or not to be had.
    """
    try:
        return _bound(host, port, is_shared=False)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise _refusal(host, port, exc) from exc
    try:
        return _bound(host, port, is_shared=True)
    except OSError as exc:
        raise _refusal(host, port, exc) from exc


def share_with_successors(listener: socket.socket) -> None:
    """Right before it listens: what lingers of its connections will keep no later server out."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _bound(host: str, port: int, *, is_shared: bool) -> socket.socket:
    # asyncio sends without delay (TCP_NODELAY) only on sockets that say they are TCP, and accepted
    # ones say what their listener says. Else Nagle's algorithm and the client's delayed
    # acknowledgement hold the second piece of every answer, its body, for 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(is_shared))
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _refusal(host: str, port: int, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on server.host {host!r}, server.port {port}: {exc.strerror}",
        param="server.port",
    )
