"""When the server changes the number of engines by itself."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from shared.config.base import SettingsModel


class AutoscalingConfig(SettingsModel):
    """Off by default: starting an engine costs a model load, and most trainers know their load."""

    enabled: bool = False
    """Whether the server scales by itself."""
    pool: str | None = None
    """Which pool is scaled; may be left out where there is one."""
    min_count: int = Field(default=1, ge=0)
    """Never fewer engines."""
    max_count: int | None = Field(default=None, ge=1)
    """The pool's own ``max_count`` when absent."""
    queue_share: float = Field(default=0.25, gt=0.0)
    """Grow while more samples wait than this share of what the engines can hold."""
    kv_cache_high: float = Field(default=0.9, gt=0.0, le=1.0)
    """Grow while requests wait inside engines whose mean KV occupancy is above this."""
    idle_share: float = Field(default=0.5, gt=0.0, lt=0.8)
    """Shrink while one engine fewer would be filled to less than this share, samples and KV."""
    grow_after_s: float = Field(default=10.0, ge=0.0)
    """A reason to grow must last this long."""
    shrink_after_s: float = Field(default=120.0, ge=0.0)
    """A reason to shrink must last this long: longer than a training step without rollouts."""
    grow_cooldown_s: float = Field(default=30.0, ge=0.0)
    """After any change, before the next growth."""
    shrink_cooldown_s: float = Field(default=120.0, ge=0.0)
    """After any change, before the next shrinking."""

    @model_validator(mode="after")
    def limits_in_order(self) -> Self:
        if self.max_count is not None and self.min_count > self.max_count:
            raise ValueError(
                f"engine.autoscaling.min_count {self.min_count} is above "
                f"engine.autoscaling.max_count {self.max_count}"
            )
        return self

    @model_validator(mode="after")
    def growing_is_no_reason_to_shrink(self) -> Self:
        if self.idle_share >= self.kv_cache_high:
            raise ValueError(
                f"engine.autoscaling.idle_share {self.idle_share:g} is not below "
                f"engine.autoscaling.kv_cache_high {self.kv_cache_high:g}: it would shrink what it "
                "has just grown"
            )
        return self
