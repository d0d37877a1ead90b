"""``/v1/speculation``: the policy, live, and what each engine does because of it."""

from __future__ import annotations

from pydantic import Field

from shared.schemas.base import WireModel
from shared.types import SpeculationMode, SpeculationReason


class SpeculationPatch(WireModel):
    """Body of ``PATCH /v1/speculation``: the fields to change, on every engine."""

    mode: SpeculationMode | None = None
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    kv_cache_threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    kv_cache_hysteresis: float | None = Field(default=None, ge=0.0, le=1.0)
    min_dwell_steps: int | None = Field(default=None, ge=0)


class SpeculationPolicy(WireModel):
    """The policy in force. See ``shared.config.speculation`` for what each field means."""

    mode: SpeculationMode
    num_speculative_tokens: int
    kv_cache_threshold: float
    kv_cache_hysteresis: float
    min_dwell_steps: int


class SpeculationStep(WireModel):
    """One recorded decision of an engine's scheduler."""

    step: int
    time_s: float
    """Unix time of the step."""
    kv_cache_usage: float
    """Fraction 0..1 of the engine's KV blocks in use."""
    num_running_reqs: int
    num_waiting_reqs: int
    num_speculative_tokens: int
    reason: SpeculationReason


class EngineSpeculation(WireModel):
    """What one engine's scheduler does now and why."""

    engine_id: str
    enabled: bool
    num_speculative_tokens: int
    reason: SpeculationReason
    kv_cache_usage: float
    num_steps: int
    num_steps_on: int
    num_switches: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]  # [max_num_speculative_tokens]
    mean_acceptance_length: float
    """1 + accepted / drafts: includes the bonus token, as in vLLM. 0 before the first draft."""
    history: list[SpeculationStep]
    """Recorded decisions after ``since_step``: every switch, and samples in between."""


class SpeculationResponse(WireModel):
    """Answer of ``GET`` and ``PATCH /v1/speculation``."""

    policy: SpeculationPolicy
    max_num_speculative_tokens: int
    """Upper limit of ``num_speculative_tokens`` while the engines run."""
    engines: list[EngineSpeculation]
