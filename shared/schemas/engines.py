"""``/v1/engines``: the rollout workers and their load."""

from __future__ import annotations

from pydantic import Field

from shared.schemas.base import WireModel
from shared.types import DrafterScheme, EngineState, PauseMode


class EngineStatus(WireModel):
    """One engine as the server sees it."""

    engine_id: str
    state: EngineState
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


class EnginesResponse(WireModel):
    """Answer of every route that reads or changes the set of engines."""

    target_count: int
    engines: list[EngineStatus]
    pause_mode: PauseMode | None = None
    """How ``POST /v1/pause`` stopped generation; null while engines generate."""


class ScaleRequest(WireModel):
    """Body of ``PUT /v1/engines``."""

    count: int = Field(ge=0)


class LeaveRequest(WireModel):
    """Body of ``POST /v1/engines/{engine_id}/drain``."""

    replace: bool = True
    """Start another engine in its place; false lowers the number of engines by one."""


class PauseRequest(WireModel):
    """Body of ``POST /v1/pause``."""

    mode: PauseMode = PauseMode.KEEP
    """What becomes of running sequences."""
