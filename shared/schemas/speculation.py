"""``/v1/speculation``: the policy, live, and what each engine does because of it."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from shared.config.speculation import (
    DEFAULT_EXPLORATION_FRACTION,
    DEFAULT_MIN_SPEEDUP,
    DEFAULT_SWITCH_MARGIN,
)
from shared.schemas.base import Checked, WireModel
from shared.types import SpeculationMode, SpeculationReason


class SpeculationPatch(WireModel):
    """The fields of the policy to change. A field that is left out, or null, stays as it is."""

    mode: SpeculationMode | None = None
    """``off``; ``always`` (whatever the load); ``kv_gate`` (a fixed draft length below the KV
    threshold); ``adaptive`` (below it, the draft length that makes the most tokens per second)."""
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    """Draft length; the longest that ``adaptive`` chooses. At most ``max_num_speculative_tokens``
    of the answer."""
    kv_cache_threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    """Draft only while less than this fraction of the KV blocks is in use."""
    kv_cache_threshold_tokens: int | None = Field(default=None, ge=1)
    """The threshold in tokens, instead of the fraction; giving the fraction takes it back."""
    kv_cache_hysteresis: float | None = Field(default=None, ge=0.0, le=1.0)
    """Once closed, the gate opens again this fraction of the KV blocks below the threshold."""
    min_dwell_steps: int | None = Field(default=None, ge=0)
    """Engine steps the gate stays closed at least, once it has closed."""
    min_speedup: float | None = Field(default=None, ge=1.0, le=10.0)
    """``adaptive`` begins to draft where it predicts at least this over plain decoding."""
    switch_margin: float | None = Field(default=None, ge=0.0, le=1.0)
    """``adaptive`` leaves a draft length for another that is better by this share."""
    exploration_fraction: float | None = Field(default=None, ge=0.0, le=0.2)
    """Share of steps that ``adaptive`` may spend on draft lengths not tried lately."""
    per_request: bool | None = None
    """Verify fewer drafts of requests that accept badly (engines on CPU)."""

    @model_validator(mode="after")
    def one_threshold(self) -> Self:
        if self.kv_cache_threshold is not None and self.kv_cache_threshold_tokens is not None:
            raise ValueError(
                f"kv_cache_threshold {self.kv_cache_threshold:g} and kv_cache_threshold_tokens "
                f"{self.kv_cache_threshold_tokens} are two thresholds: give one"
            )
        return self


class SpeculationChange(SpeculationPatch):
    """Body of ``PATCH /v1/speculation``: what to change, and for whom."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"mode": "adaptive", "kv_cache_threshold": 0.4},
                {"kv_cache_threshold_tokens": 60000, "kv_cache_hysteresis": 0.02},
                {"mode": "off", "engine_ids": ["engine-1"]},
            ]
        }
    )

    engine_ids: Checked[str] | None = Field(default=None, min_length=1)
    """Engines that get settings of their own, which last until the next change for all. Left out:
    all engines and those that join later, and no engine keeps settings of its own."""

    @property
    def patch(self) -> SpeculationPatch:
        """What to change, without for whom."""
        return SpeculationPatch.model_validate(self.model_dump(exclude={"engine_ids"}))


class SpeculationPolicy(WireModel):
    """The policy in force; ``SpeculationPatch`` tells what each field means."""

    mode: SpeculationMode
    num_speculative_tokens: int
    kv_cache_threshold: float
    """Not in force while ``kv_cache_threshold_tokens`` is set."""
    kv_cache_threshold_tokens: int | None = None
    kv_cache_hysteresis: float
    min_dwell_steps: int
    min_speedup: float = DEFAULT_MIN_SPEEDUP
    switch_margin: float = DEFAULT_SWITCH_MARGIN
    exploration_fraction: float = DEFAULT_EXPLORATION_FRACTION
    per_request: bool = False


class SpeculationStep(WireModel):
    """One recorded decision of an engine's scheduler."""

    step: int
    """Counts the engine's steps from 1."""
    time_s: float
    """Unix time of the step."""
    kv_cache_usage: float
    """Fraction 0..1 of the engine's KV blocks in use, slots for the step's drafts included."""
    num_running_reqs: int
    num_waiting_reqs: int
    num_kv_tokens: int = 0
    """Tokens in the KV cache of the running requests."""
    num_generated_tokens: int = 0
    """By the engine so far: rises between two records by what it generated between them."""
    num_speculative_tokens: int
    """Draft length of the step."""
    reason: SpeculationReason
    predicted_tokens_per_s: float | None = None
    """Of steps like this one; null where no cost model was asked."""
    predicted_speedup: float | None = None
    """The same over plain decoding."""


class EngineSpeculation(WireModel):
    """What one engine's scheduler does now and why."""

    engine_id: str
    enabled: bool
    """Whether the latest step drafted."""
    num_speculative_tokens: int
    """Draft length of the latest step."""
    reason: SpeculationReason
    """Why."""
    kv_cache_usage: float
    """Fraction 0..1 of the KV blocks in use now."""
    num_steps: int
    num_steps_on: int
    """Steps that drafted."""
    num_switches: int
    """Times that drafting went on or off."""
    num_drafts: int
    """Verified drafts: one per request and step."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]  # [max_num_speculative_tokens]
    """Accepted drafts at each position."""
    mean_acceptance_length: float
    """1 + accepted / drafts: includes the bonus token, as in vLLM. 0 before the first draft."""
    num_steps_per_k: list[int] = Field(default_factory=list)  # [max_num_speculative_tokens + 1]
    """Steps that drafted 0, 1, ... tokens."""
    time_s_per_k: list[float] = Field(default_factory=list)  # [max_num_speculative_tokens + 1]
    """Seconds of the finished steps that drafted 0, 1, ... tokens."""
    num_steps_per_reason: dict[SpeculationReason, int] = Field(default_factory=dict)
    num_steps_per_kv_usage: list[int] = Field(default_factory=list)
    """Decisions taken at 0 to 0.1, 0.1 to 0.2, ... 0.9 to 1 of the KV blocks in use."""
    kv_cache_usage_sum: float = 0.0
    """Over all decisions, of the fraction of KV blocks in use."""
    acceptance_per_pos: list[float] = Field(default_factory=list)  # [max_num_speculative_tokens]
    """Moving figure per position, given that all drafts before it were accepted."""
    num_acceptance_changes: int = 0
    """Times that acceptance had changed beyond chance and was counted afresh."""
    cost_model: str = ""
    """Where the cost model comes from: a calibration's name, ``self``, or ``conservative``."""
    machine_factor: float = 1.0
    """How much slower than calibrated every step is now."""
    num_predicted_steps: int = 0
    """Finished steps whose seconds the cost model had an expectation of."""
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
    """Of every engine without settings of its own, and of those that join."""
    overrides: dict[str, SpeculationPolicy] = Field(default_factory=dict)
    """Whole policies of engines with settings of their own, by engine id."""
    max_num_speculative_tokens: int
    """Upper limit of ``num_speculative_tokens`` while the engines run."""
    engines: list[EngineSpeculation]
