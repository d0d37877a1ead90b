"""Engine pools: engines that are sized and placed alike, and where on the cluster they go."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from shared.config.base import SettingsModel
from shared.pool_types import PlacementStrategy

DEFAULT_POOL = "default"
"""Name of the one pool there is without ``engine.pools``."""


class PlacementConfig(SettingsModel):
    """Which nodes engines may run on, beside those that have the CPUs and GPUs."""

    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources an engine reserves, by name."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Only nodes with these Ray labels; values may be ``x``, ``!x``, ``in(x,y)``, ``!in(x,y)``."""
    node_ids: list[str] = Field(default_factory=list)
    """Only these nodes, by Ray's hexadecimal ids; empty allows all."""
    strategy: PlacementStrategy = PlacementStrategy.PACK
    """A wish among the nodes that are allowed and have room."""

    @field_validator("resources")
    @classmethod
    def custom_and_positive(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU"):
                raise ValueError(f"{name} is set with num_{name.lower()}s, not as a resource")
            if amount <= 0:
                raise ValueError(f"resource {name} {amount:g} must be above 0")
        return resources


class PoolConfig(SettingsModel):
    """One pool. What is left out is as under ``engine``."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    """By which commands, metrics and engine ids know it."""
    count: int = Field(default=1, ge=0)
    """Engines at the start."""
    max_count: int = Field(default=64, ge=1)
    """Highest count ``PUT /v1/engines`` accepts for it."""
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    """Instead of ``engine.tensor_parallel_size``."""
    num_cpus: float | None = Field(default=None, ge=0.0)
    """Instead of ``engine.num_cpus``."""
    num_gpus: float | None = Field(default=None, ge=0.0)
    """Instead of ``engine.num_gpus``."""
    cpu_cores: list[str] | None = None
    """Instead of ``engine.cpu_cores``."""
    kv_cache_memory_mib: int | None = Field(default=None, ge=1)
    """Instead of ``engine.kv_cache_memory_mib``."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0.0, le=1.0)
    """Instead of ``engine.gpu_memory_utilization``."""
    placement: PlacementConfig | None = None

    @model_validator(mode="after")
    def count_within_max(self) -> Self:
        if self.count > self.max_count:
            raise ValueError(
                f"count {self.count} of engine pool {self.name} is above its max_count "
                f"{self.max_count}"
            )
        return self


OVERRIDES = frozenset(PoolConfig.model_fields) - {"name"}
"""Settings of ``engine`` that a pool may have for itself."""
