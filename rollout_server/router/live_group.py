"""What the router remembers of a request that is not answered yet."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from rollout_server.engine.protocol import EngineHandle, GenerateRequest
from rollout_server.router.dispatch_queue import Placement
from rollout_server.router.group_work import GroupWork, Piece
from shared.errors import EngineError
from shared.logging import log_context

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class LiveGroup:
    """One group between its acceptance and its answer."""

    request: GenerateRequest
    work: GroupWork | None
    """None for a stream, whose tokens are gone as soon as they are sampled."""
    placement: Placement | None = None
    """Where it is now; None while it waits."""
    ahead: Placement | None = None
    """Where its samples go on that the present engine is late with."""
    late_on: str | None = None
    """The engine that is late with them, from when it is told to stop to the next hand-over."""
    is_told: bool = False
    """Whether the circuit breaker knows how the present placement ends."""
    since_s: float | None = None
    """When its first engine got it."""
    request_ids: tuple[str, ...] = ()
    """What the engine calls it."""
    pieces: list[Piece] = field(default_factory=list)
    """Of the present attempt."""
    is_aborted: bool = False

    @property
    def handle(self) -> EngineHandle | None:
        """The engine that holds it now."""
        return None if self.placement is None else self.placement.handle


async def abort_on_engine(handle: EngineHandle, group: LiveGroup) -> None:
    """End whatever the engine has of a group; its ``generate`` calls return what there is."""
    for request_id in group.request_ids:
        try:
            await handle.abort(request_id)
        except EngineError as exc:
            # Its generate call ends with the same trouble; there is nobody else to tell.
            with log_context(group_id=request_id, engine_id=handle.engine_id):
                LOGGER.warning(
                    "abort of %s on %s failed: %s", request_id, handle.engine_id, exc.message
                )
