"""uvicorn as the service is served with it, wherever it is started (``launch.py``, benchmarks)."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from rollout_server.api.app import create_app
from rollout_server.service import RolloutService
from shared.api_keys import ApiKeys
from shared.errors import SlipstreamError

LISTENING_POLL_S = 0.005


def http_server(service: RolloutService, api_keys: ApiKeys) -> uvicorn.Server:
    """Of the API over ``service``; ``serve_quietly`` runs it."""
    server = service.config.server
    return uvicorn.Server(
        uvicorn.Config(
            create_app(service, api_keys),
            log_level="warning",
            log_config=None,  # its lines go through ours, in the configured format
            access_log=False,
            timeout_graceful_shutdown=int(server.shutdown_timeout_s),
            lifespan="off",
            ssl_certfile=server.tls_certificate_file,
            ssl_keyfile=server.tls_key_file,
        )
    )


async def serve_quietly(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until ``server.should_exit``."""
    # ``_serve`` is ``serve`` without uvicorn's own signal handling, which would race with ours.
    await server._serve(sockets=[listener])


async def until_listening(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Until connections are accepted (uvicorn: ``Server.started``).

    Args:
        serving: ``serve_quietly``.

    Raises:
        Exception: whatever keeps it from listening.
        SlipstreamError: it ended before.
    """
    while not server.started:
        if serving.done():
            await serving
            raise SlipstreamError("the HTTP server ended before it listened on its port")
        await asyncio.sleep(LISTENING_POLL_S)
