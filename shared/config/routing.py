"""How the router treats engines that fail groups, and groups that are late."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from shared.config.base import SettingsModel


class CircuitBreakerConfig(SettingsModel):
    """When the router stops giving groups to an engine that serves and fails them."""

    enabled: bool = True
    """False goes on giving it groups."""
    num_failures: int = Field(default=5, ge=1)
    """Groups that fail on an engine in a row before others are preferred to it."""
    open_s: float = Field(default=5.0, gt=0)
    """For how long; then one group tries it. Doubled each time that one fails too."""
    max_open_s: float = Field(default=120.0, gt=0)
    """Longest of those times."""

    @model_validator(mode="after")
    def times_in_order(self) -> Self:
        if self.open_s > self.max_open_s:
            raise ValueError(
                f"server.circuit_breaker.open_s {self.open_s:g} is above "
                f"server.circuit_breaker.max_open_s {self.max_open_s:g}"
            )
        return self


class StragglersConfig(SettingsModel):
    """The last samples of a late group can go on on another engine, behind the tokens they have."""

    enabled: bool = False
    """Hand them over. Each costs a prefill of its prompt and tokens; none is sampled twice."""
    max_samples: int = Field(default=2, ge=1)
    """A group is late only while at most so many of its samples are unfinished."""
    patience: float = Field(default=2.0, ge=1.0)
    """And once it has run longer than so many times the median of the last groups."""
