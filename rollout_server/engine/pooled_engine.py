"""What the pool asks of an engine beside ``EngineHandle``: its life from start to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.facts import EngineFacts
from rollout_server.engine.footprint import Footprint
from rollout_server.engine.protocol import EngineHandle
from shared.errors import UnknownResourceError
from shared.types import EngineState


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


def find_engine(engines: Sequence[PooledEngine], engine_id: str) -> PooledEngine:
    """One that is not gone.

    Raises:
        UnknownResourceError: there is none of this name.
    """
    alive = {e.engine_id: e for e in engines if e.state is not EngineState.DEAD}
    if engine_id not in alive:
        raise UnknownResourceError(
            f"no engine {engine_id!r}; there are: {', '.join(alive) or 'none'}", param="engine_id"
        )
    return alive[engine_id]
