"""uvicorn as the service is served with it, wherever it is started (``launch.py``, benchmarks)."""

from __future__ import annotations

import socket

import uvicorn

from rollout_server.api.app import create_app
from rollout_server.service import RolloutService
from shared.api_keys import ApiKeys


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
