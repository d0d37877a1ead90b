"""Routers over fake engines, and groups for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import monotonic

from rollout_server.engine.protocol import GenerateRequest
from rollout_server.router.circuit_breaker import BreakerLimits
from rollout_server.router.dispatch_queue import Reserved
from rollout_server.router.router import RoutedResult, Router
from rollout_server.router.stragglers import StragglerLimits
from shared.schemas.rollouts import SamplingOptions
from tests.fakes.engine import FakeEngine
from tests.fakes.pool import FakePool

ONE = Reserved(num_samples=1, num_tokens=10)


def group(name: str, n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=[1, 2], n=n, sampling=SamplingOptions()
    )


@asynccontextmanager
async def router_over(
    engines: Sequence[FakeEngine],
    *,
    room: int = 4,
    engine_wait_timeout_s: float = 60.0,
    max_attempts: int = 3,
    may_continue: bool = True,
    breaker: BreakerLimits | None = None,
    stragglers: StragglerLimits | None = None,
    clock: Callable[[], float] = monotonic,
) -> AsyncIterator[tuple[Router, FakePool]]:
    pool = FakePool(engines)
    router = Router(
        pool,
        max_pending_samples=100,
        max_samples_per_engine=room,
        engine_wait_timeout_s=engine_wait_timeout_s,
        max_attempts=max_attempts,
        may_continue=may_continue,
        progress_interval_s=0.01,
        breaker=breaker,
        stragglers=stragglers,
        clock=clock,
    )
    await router.start()
    try:
        yield router, pool
    finally:
        await router.close()


def spawn(router: Router, *requests: GenerateRequest) -> list[asyncio.Task[RoutedResult]]:
    return [asyncio.create_task(router.generate(request)) for request in requests]


def blocked(engine_id: str) -> FakeEngine:
    engine = FakeEngine(engine_id)
    engine.unblocked.clear()
    return engine
