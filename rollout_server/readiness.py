"""Whether the service takes requests, for ``GET /readyz``."""

from __future__ import annotations

from rollout_server.engine.protocol import EnginePool
from rollout_server.router.strategy import READY_STATES
from shared.errors import UnavailableError
from shared.pool_types import RestartState
from shared.schemas.operations import ReadyzResponse


def readiness(pool: EnginePool, refusal: str | None) -> ReadyzResponse:
    """How many engines take requests.

    Args:
        refusal: why nothing new is accepted, if that is so.

    Raises:
        UnavailableError: no engine does, or the server refuses everything.
    """
    if refusal is not None:
        raise UnavailableError(refusal)
    quarantined = [p.name for p in pool.pools() if p.restart_state is RestartState.QUARANTINED]
    engines = pool.engines()
    num_ready = sum(engine.state in READY_STATES for engine in engines)
    if num_ready == 0:
        states = ", ".join(f"{engine.engine_id} {engine.state.value}" for engine in engines)
        raise UnavailableError(
            f"0 of {pool.target_count} engines are ready (engines: {states or 'none'}; "
            f"quarantined pools: {', '.join(quarantined) or 'none'})"
        )
    return ReadyzResponse(
        num_ready_engines=num_ready,
        num_engines=len(engines),
        target_count=pool.target_count,
        quarantined_pools=quarantined,
    )
