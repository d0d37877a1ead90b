"""``/v1/engines``: the rollout workers and their load."""

from __future__ import annotations

from pydantic import Field

from shared.config.pools import DEFAULT_POOL
from shared.pool_types import CircuitState, EngineHealth, RestartState
from shared.schemas.base import WireModel
from shared.types import DrafterScheme, EngineState, PauseMode


class EngineStatus(WireModel):
    """One engine as the server sees it."""

    engine_id: str
    pool: str = DEFAULT_POOL
    node_id: str = ""
    """Ray's name of the node it runs on; empty until it has started."""
    state: EngineState
    health: EngineHealth = EngineHealth.HEALTHY
    """Whether it makes progress, as far as its last answers tell."""
    circuit: CircuitState = CircuitState.CLOSED
    """Whether the router gives it groups, from how its last ones ended."""
    error: str | None = None
    """Why the engine is dead, if it is."""
    pid: int | None
    cpu_cores: str | None
    """Cores the engine is bound to (CPU engines), in vLLM's notation."""
    target_version: int
    drafter_version: int
    drafter_scheme: DrafterScheme
    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    num_generation_tokens: int
    num_prompt_tokens: int
    num_preemptions: int
    num_reserved: int
    """Samples the router has handed to this engine and not had back."""
    start_up_s: float
    uptime_s: float


class EnginePoolStatus(WireModel):
    """One pool of engines that are sized and placed alike."""

    name: str
    target_count: int
    max_count: int
    num_engines: int
    """Engines that start or serve."""
    num_serving: int
    restart_state: RestartState
    restart_in_s: float
    """While it backs off: seconds until it replaces engines again."""
    num_losses: int
    """Engines that did not start, died or were given up, since the server started."""
    num_losses_in_window: int
    """Of those, the ones that count against the budget now."""
    loss_budget: int
    """With more than this within ``engine.restart_window_s``, the pool is quarantined."""
    last_loss: str | None = None
    """Why the last one was lost."""


class EnginesResponse(WireModel):
    """Answer of every route that reads or changes the set of engines."""

    target_count: int
    """Of all pools together."""
    engines: list[EngineStatus]
    pools: list[EnginePoolStatus] = Field(default_factory=list)
    pause_mode: PauseMode | None = None
    """How ``POST /v1/pause`` stopped generation; null while engines generate."""


class ScaleRequest(WireModel):
    """Body of ``PUT /v1/engines``. Ends a quarantine of the pool, also with the count it has."""

    count: int = Field(ge=0)
    pool: str | None = None
    """Which pool; may be left out where there is one."""


class LeaveRequest(WireModel):
    """Body of ``POST /v1/engines/{engine_id}/drain``."""

    replace: bool = True
    """Start another engine in its place; false lowers the number of engines by one."""


class PauseRequest(WireModel):
    """Body of ``POST /v1/pause``."""

    mode: PauseMode = PauseMode.KEEP
    """What becomes of running sequences."""
