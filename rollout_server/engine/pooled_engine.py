"""What the pool asks of an engine beside ``EngineHandle``: its life from start to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rollout_server.engine.actor import EngineFacts
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.footprint import Footprint
from rollout_server.engine.protocol import EngineHandle


class PooledEngine(EngineHandle, Protocol):
    """Implemented by ``handle.RayEngineHandle``, and in memory by ``tests/fakes/pooled.py``."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def footprint(self) -> Footprint | None:
        """What it would leave behind; known once it has started."""
        ...

    async def start(self) -> EngineFacts:
        """Find a node, load and warm up; the state stays STARTING.

        Raises:
            SlipstreamError: it did not start; whoever called condemns it.
        """
        ...

    def serve(self) -> None:
        """STARTING -> SERVING."""
        ...

    def begin_drain(self) -> None:
        """To DRAINING: no new requests from here on."""
        ...

    async def stop(self, reason: str) -> None:
        """To DEAD, and nothing of it is left. Idempotent; never raises ``SlipstreamError``."""
        ...


CreateEngine = Callable[[EngineSpec], PooledEngine]
"""Makes a handle at once; nothing runs before its ``start``."""
