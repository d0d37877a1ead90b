"""When engines draft, and how much."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from shared.config.base import SettingsModel
from shared.types import SpeculationMode

DEFAULT_MIN_SPEEDUP = 1.02
DEFAULT_SWITCH_MARGIN = 0.01
DEFAULT_EXPLORATION_FRACTION = 0.02


def never_opens(hysteresis: float, threshold: float) -> bool:
    """Whether a gate that has closed would stay so: it opens below ``threshold - hysteresis``.

    Both at zero is another thing: a gate that is meant to be closed.
    """
    return hysteresis > 0 and hysteresis >= threshold


class SpeculationConfig(SettingsModel):
    """The speculation policy engines start with; ``PATCH /v1/speculation`` changes it live."""

    mode: SpeculationMode = SpeculationMode.ADAPTIVE
    """When engines draft."""
    num_speculative_tokens: int = Field(default=4, ge=1, le=16)
    """Draft length per cycle while speculation is on; the longest that ``adaptive`` chooses."""
    max_num_speculative_tokens: int | None = Field(default=None, ge=1, le=16)
    """Upper limit for live changes (KV slots are reserved for it); defaults to the above."""
    kv_cache_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    """Speculate only while KV-cache occupancy (fraction of blocks) is below this."""
    kv_cache_threshold_tokens: int | None = Field(default=None, ge=1)
    """The threshold in tokens, instead of the fraction: does not change with the pool's size."""
    kv_cache_hysteresis: float = Field(default=0.05, ge=0.0, le=1.0)
    """Once closed, the gate opens again below ``threshold - hysteresis``."""
    min_dwell_steps: int = Field(default=8, ge=0)
    """Engine steps the gate stays closed at least, once it has closed."""
    min_speedup: float = Field(default=DEFAULT_MIN_SPEEDUP, ge=1.0, le=10.0)
    """``adaptive`` begins to draft where it predicts at least this over plain decoding."""
    switch_margin: float = Field(default=DEFAULT_SWITCH_MARGIN, ge=0.0, le=1.0)
    """``adaptive`` leaves a draft length for another that is better by this share."""
    exploration_fraction: float = Field(default=DEFAULT_EXPLORATION_FRACTION, ge=0.0, le=0.2)
    """Share of steps that ``adaptive`` may spend on draft lengths it has not tried lately."""
    per_request: bool = False
    """Verify fewer drafts of requests that accept badly (where vLLM schedules synchronously)."""
    calibration: str | None = None
    """A calibration file or a directory of them; by default ``deploy/calibration`` if it is there.
    Only a file measured on the same device, model shape, scheme and parallelism is used."""
    self_calibration_s: float = Field(default=10.0, ge=0.0, le=600.0)
    """Without a file: seconds an ``adaptive`` engine may measure itself at start; 0: not at all."""
    trace_directory: str | None = None
    """Write every engine's decisions there, for ``slipstream speculation replay``."""
    history_size: int = Field(default=4096, ge=16)
    """Decisions an engine remembers for ``GET /v1/speculation``."""

    @field_validator("mode", mode="before")
    @classmethod
    def off_is_a_word(cls, value: object) -> object:
        """YAML reads an unquoted ``off`` as false."""
        return SpeculationMode.OFF if value is False else value

    @model_validator(mode="after")
    def consistent(self) -> Self:
        limit = self.max_num_speculative_tokens
        if limit is not None and self.num_speculative_tokens > limit:
            raise ValueError(
                f"speculation.num_speculative_tokens {self.num_speculative_tokens} is above "
                f"speculation.max_num_speculative_tokens {limit}"
            )
        if never_opens(self.kv_cache_hysteresis, self.kv_cache_threshold):
            raise ValueError(
                f"speculation.kv_cache_hysteresis {self.kv_cache_hysteresis} is not below "
                f"speculation.kv_cache_threshold {self.kv_cache_threshold}: the gate could never "
                "open again"
            )
        return self

    @property
    def reserved_speculative_tokens(self) -> int:
        """Draft length the engines reserve KV slots for."""
        return self.max_num_speculative_tokens or self.num_speculative_tokens
