"""Engines in memory with a life from start to stop, as the pool wants them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.facts import EngineFacts
from rollout_server.engine.footprint import Footprint
from rollout_server.speculation.calibration import SelfCalibration
from shared.errors import EngineError
from shared.types import DrafterScheme, EngineState
from tests.fakes.engine import FakeEngine


@dataclass(eq=False)
class FakePooledEngine(FakeEngine):
    """Implements ``PooledEngine``. Made by ``FakeEngines``."""

    spec: EngineSpec = None  # type: ignore[assignment]  # always given
    start_error: Exception | None = None
    may_start: asyncio.Event = field(default_factory=asyncio.Event)
    footprint: Footprint | None = None
    measured: SelfCalibration | None = None
    stop_s: float = 0.0
    stopped: list[str] = field(default_factory=list)
    """Reasons it was stopped for."""

    async def start(self) -> EngineFacts:
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        return EngineFacts(
            pid=1,
            num_kv_blocks=100,
            block_size=16,
            max_model_len=1024,
            vocab_size=256,
            start_up_s=0.0,
            drafter_scheme=DrafterScheme.INT8,
            drafter_bytes=0,
            self_calibration=self.measured,
        )

    def serve(self) -> None:
        assert self.state is EngineState.STARTING
        self.state = EngineState.SERVING

    def begin_drain(self) -> None:
        self.state = EngineState.DRAINING

    async def stop(self, reason: str) -> None:
        self.die(reason)
        await asyncio.sleep(self.stop_s)
        self.stopped.append(reason)


class FakeEngines:
    """Implements ``CreateEngine``. By default every engine starts at once."""

    def __init__(self) -> None:
        self.made: list[FakePooledEngine] = []
        self.start_errors: dict[str, EngineError] = {}
        """By pool: what engines made from now on fail to start with."""
        self.measured: dict[str, SelfCalibration] = {}
        """By pool: what engines made from now on measure of themselves."""
        self.stop_s = 0.0
        """How long engines made from now on take to stop."""
        self.held_pools: set[str] = set()
        """Engines of these pools, made from now on, start when their ``may_start`` is set."""

    def __call__(self, spec: EngineSpec) -> FakePooledEngine:
        engine = FakePooledEngine(
            spec.engine_id,
            EngineState.STARTING,
            spec=spec,
            start_error=self.start_errors.get(spec.pool),
            measured=self.measured.get(spec.pool),
            stop_s=self.stop_s,
        )
        if spec.pool not in self.held_pools:
            engine.may_start.set()
        self.made.append(engine)
        return engine

    def of(self, pool: str) -> list[FakePooledEngine]:
        """Those made for one pool, in order."""
        return [engine for engine in self.made if engine.spec.pool == pool]
