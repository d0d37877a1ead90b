"""The API on a real uvicorn, on a free port of 127.0.0.1, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from rollout_server.api.app import create_app
from rollout_server.service import RolloutService
from shared.api_keys import ApiKeys
from tests.fakes.service import until


@asynccontextmanager
async def serving(
    service: RolloutService, api_keys: ApiKeys | None = None, port: int = 0
) -> AsyncIterator[str]:
    """Start service and server; yields the base URL, and checks the books at the end.

    Speaks HTTPS where the service's configuration has a certificate.

    Args:
        port: of a server that was there before; 0 picks a free one.
    """
    await service.start()
    await service.restore()
    options = service.config.server
    config = uvicorn.Config(
        create_app(service, api_keys),
        host="127.0.0.1",
        port=port,
        log_level="warning",
        lifespan="off",
        ssl_certfile=options.tls_certificate_file,
        ssl_keyfile=options.tls_key_file,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or task.done(), "uvicorn to start")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"{options.url_scheme}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await service.close()
        await asyncio.wait_for(task, 10)
        service.router.accounts.check()
        assert service.router.accounts.num_pending == 0
