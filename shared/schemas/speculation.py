"""``/v1/speculation``: the policy, live, and what each engine does because of it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from shared.schemas.base import WireModel
from shared.types import SpeculationMode, SpeculationReason


class SpeculationPatch(WireModel):
    """The fields of the policy to change."""

    mode: SpeculationMode | None = None
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    kv_cache_threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    kv_cache_threshold_tokens: int | None = Field(default=None, ge=1)
    """Instead of the fraction; giving the fraction takes it back."""
    kv_cache_hysteresis: float | None = Field(default=None, ge=0.0, le=1.0)
    min_dwell_steps: int | None = Field(default=None, ge=0)
    min_speedup: float | None = Field(default=None, ge=1.0, le=10.0)
    switch_margin: float | None = Field(default=None, ge=0.0, le=1.0)
    exploration_fraction: float | None = Field(default=None, ge=0.0, le=0.2)
    per_request: bool | None = None

    @model_validator(mode="after")
    def one_threshold(self) -> Self:
        if self.kv_cache_threshold is not None and self.kv_cache_threshold_tokens is not None:
            raise ValueError(
                f"kv_cache_threshold {self.kv_cache_threshold:g} and kv_cache_threshold_tokens "
                f"{self.kv_cache_threshold_tokens} are two thresholds: give one"
            )
        return self


class SpeculationPolicy(WireModel):
    """The policy in force. See ``shared.config.speculation`` for what each field means."""

    mode: SpeculationMode
    num_speculative_tokens: int
    kv_cache_threshold: float
    kv_cache_threshold_tokens: int | None = None
    kv_cache_hysteresis: float
    min_dwell_steps: int
    min_speedup: float = 1.05
    switch_margin: float = 0.03
    exploration_fraction: float = 0.02
    per_request: bool = False


class SpeculationStep(WireModel):
    """One recorded decision of an engine's scheduler."""

    step: int
    time_s: float
    """Unix time of the step."""
    kv_cache_usage: float
    """Fraction 0..1 of the engine's KV blocks in use, slots for the step's drafts included."""
    num_running_reqs: int
    num_waiting_reqs: int
    num_kv_tokens: int = 0
    num_speculative_tokens: int
    reason: SpeculationReason
    predicted_tokens_per_s: float | None = None
    """Of steps like this one; null where no cost model was asked."""
    predicted_speedup: float | None = None
    """The same over plain decoding."""


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
    num_steps_per_k: list[int] = Field(default_factory=list)  # [max_num_speculative_tokens + 1]
    time_s_per_k: list[float] = Field(default_factory=list)  # [max_num_speculative_tokens + 1]
    """Seconds of the finished steps that drafted 0, 1, ... tokens."""
    num_steps_per_reason: dict[SpeculationReason, int] = Field(default_factory=dict)
    acceptance_per_pos: list[float] = Field(default_factory=list)  # [max_num_speculative_tokens]
    """Moving figure per position, given that all drafts before it were accepted."""
    num_acceptance_changes: int = 0
    """Times that acceptance had changed beyond chance and was counted afresh."""
    cost_model: str = ""
    """Where the cost model comes from: a calibration's name, ``self``, or ``conservative``."""
    machine_factor: float = 1.0
    """How much slower than calibrated every step is now."""
    num_predicted_steps: int = 0
    predicted_step_s: float = 0.0
    """Seconds the cost model expected of those steps, in all."""
    realised_step_s: float = 0.0
    """Seconds they took."""
    median_step_time_error: float | None = None
    """Median of ``|predicted / realised - 1|`` over the latest of them."""
    history: list[SpeculationStep]
    """Recorded decisions after ``since_step``: every switch, and samples in between."""


class SpeculationResponse(WireModel):
    """Answer of ``GET`` and ``PATCH /v1/speculation``."""

    policy: SpeculationPolicy
    max_num_speculative_tokens: int
    """Upper limit of ``num_speculative_tokens`` while the engines run."""
    engines: list[EngineSpeculation]
