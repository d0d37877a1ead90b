"""Starts the whole server process: Ray, engines, scoring, HTTP; and takes it down again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rollout_server.draining import StopSignals, StopWish, drain
from rollout_server.engine.cluster import (
    draining_nodes,
    leave_cluster,
    start_or_join_cluster,
)
from rollout_server.engine.host_sweep import sweep_host
from rollout_server.engine.pool import RayEnginePool
from rollout_server.http_server import http_server, serve_quietly, until_listening
from rollout_server.listener import bound_socket, share_with_successors
from rollout_server.model_info import read_model_info, resolve_device
from rollout_server.rollouts.ledger import Ledger, NoLedger, RolloutLedger
from rollout_server.scoring.pool import ScoringPool
from rollout_server.service import RolloutService
from rollout_server.tokenizer import HuggingFaceTokenizer
from rollout_server.tracing import close_tracing, configure_tracing
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.observed_coordinator import ObservedCoordinator
from rollout_server.weights.recovery import recover
from rollout_server.weights.transports.ray_transport import start_snapshot_files
from shared.api_keys import ApiKeys
from shared.clock import SystemClock
from shared.config.run import RunConfig
from shared.config.server_access import is_loopback
from shared.weights import sweep_stale_segments

logger = logging.getLogger(__name__)


@asynccontextmanager
async def running_service(config: RunConfig) -> AsyncIterator[tuple[RolloutService, str]]:
    """Everything but HTTP. Yields the service and the Ray address; stops it all on exit."""
    _sweep_segments(config)
    configure_tracing(config.tracing)
    device = resolve_device(config.engine.device)
    model = read_model_info(config)
    tokenizer = HuggingFaceTokenizer.load(
        config.model.path, trust_remote_code=config.model.trust_remote_code
    )
    async with contextlib.AsyncExitStack() as stack:
        # Once more in the end: a trainer that died in a push may be the last there was.
        stack.callback(_sweep_segments, config)
        stack.callback(close_tracing)
        ledger = CommitLedger(config.weights_state_dir)
        stack.callback(ledger.close)
        recovered = await asyncio.to_thread(
            recover, ledger, config.weights.lost_snapshot, config.weights.directory
        )
        rollout_ledger = await _open_rollout_ledger(config)
        stack.push_async_callback(rollout_ledger.close)
        await asyncio.to_thread(sweep_host)
        # Once more after Ray has gone, and with it engines that were killed while they started.
        stack.push_async_callback(asyncio.to_thread, sweep_host)
        ray_address = start_or_join_cluster(config.ray)
        stack.callback(leave_cluster)
        files = await start_snapshot_files(config.weights)
        pool = RayEnginePool(config, model, device, draining_nodes=draining_nodes)
        stack.push_async_callback(pool.close)
        coordinator = ObservedCoordinator(
            pool, config.weights, SystemClock(), ledger, recovered, config.model.path, files
        )
        scoring = ScoringPool(config.scoring)
        service = RolloutService(config, pool, scoring, coordinator, tokenizer, rollout_ledger)
        pool.before_serving(coordinator.bring_up_to_date)
        pool.before_serving(service.live_speculation.apply_to)
        pool.before_serving(service.generation.apply_to)  # the last: see there
        stack.push_async_callback(service.close)
        await service.start()
        await pool.start()
        await service.restore()
        yield service, ray_address


async def _open_rollout_ledger(config: RunConfig) -> Ledger:
    if not config.server.ledger:
        return NoLedger()
    return await RolloutLedger.open(config.rollout_ledger_file)


READY_FILE_NAME = "server.json"


async def serve(config: RunConfig, api_keys: ApiKeys) -> None:
    """Serve until SIGINT or SIGTERM, those who have one of the keys (everybody if there are none).
    SIGTERM drains first (``draining.py``).

    Once requests can be served, ``<run_dir>/server.json`` holds ``{"url", "ray_address", "pid"}``.
    """
    ready_file = config.run_dir / READY_FILE_NAME
    signals = StopSignals()
    signals.listen()
    listener = bound_socket(config.server.host, config.server.port)
    try:
        async with contextlib.AsyncExitStack() as stack:
            stopping = asyncio.create_task(signals.wait(), name="stop-signal")
            starting = asyncio.create_task(stack.enter_async_context(running_service(config)))
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                logger.info("stopping before the engines have started")
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                return
            service, ray_address = await starting
            server = http_server(service, api_keys)
            share_with_successors(listener)
            serving = asyncio.create_task(serve_quietly(server, listener), name="uvicorn")
            await until_listening(server, serving)
            port = listener.getsockname()[1]
            url = f"{config.server.url_scheme}://{_local_host(config.server.host)}:{port}"
            logger.info("serving on %s, %d API keys", url, len(api_keys))
            if not api_keys and not is_loopback(config.server.host):
                logger.warning("server.allow_unauthenticated: whoever reaches %s is served", url)
            _write_ready_file(ready_file, url, ray_address)
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if signals.wish is StopWish.DRAIN:
                await drain(service, signals, config.server.drain_timeout_s)
            logger.info("stopping")
            ready_file.unlink(missing_ok=True)
            # Listeners stay as long as they are let: their streams must end before uvicorn waits.
            await service.dashboard.close()
            server.should_exit = True
            await serving
    finally:
        listener.close()
        ready_file.unlink(missing_ok=True)


def _sweep_segments(config: RunConfig) -> None:
    for name in sweep_stale_segments(config.weights.directory):
        logger.info("removed the weight segment %s of a process that is gone", name)


def _local_host(host: str) -> str:
    """How this machine reaches the server: all addresses is not one of them."""
    return "127.0.0.1" if host in ("", "0.0.0.0") else host


def _write_ready_file(path: Path, url: str, ray_address: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"url": url, "ray_address": ray_address, "pid": os.getpid()}), encoding="utf-8"
    )
    temporary.rename(path)
