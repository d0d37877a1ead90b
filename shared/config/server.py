"""The HTTP service, scoring and the Ray cluster underneath."""

from __future__ import annotations

from pydantic import Field

from shared.config.base import SettingsModel


class LimitsConfig(SettingsModel):
    """Upper limits on what a request may ask for; above them the answer is a 4xx."""

    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    max_prompts_per_request: int = Field(default=4096, ge=1)
    max_n: int = Field(default=256, ge=1)
    max_tokens: int = Field(default=131072, ge=1)
    max_pending_samples: int = Field(default=16384, ge=1)
    """Samples accepted and not delivered; above it new requests answer 429."""


class DashboardConfig(SettingsModel):
    """The page at ``/dashboard`` and the events it lives from."""

    interval_s: float = Field(default=1.0, gt=0)
    """Between two events, however much happens."""
    max_listeners: int = Field(default=16, ge=1)
    """Open streams of ``GET /v1/events``; above it the answer is 429."""


class ServerConfig(SettingsModel):
    """Where the API listens and how it behaves."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 picks a free port."""
    limits: LimitsConfig = LimitsConfig()
    dashboard: DashboardConfig = DashboardConfig()
    result_ttl_s: float = Field(default=600.0, gt=0)
    """How long a finished request's result can be fetched again."""
    result_store_mib: int = Field(default=512, ge=1)
    """Upper limit of memory for kept results; the oldest go first."""
    shutdown_timeout_s: float = Field(default=30.0, gt=0)
    status_poll_s: float = Field(default=0.5, gt=0)
    """How often engine load is read for routing and metrics."""
    engine_wait_timeout_s: float = Field(default=300.0, gt=0)
    """How long requests wait for an engine while none can take them; afterwards they answer 503."""
    max_generate_attempts: int = Field(default=3, ge=1)
    """Engines a group is tried on when engines die under it."""
    dispatch_depth: int = Field(default=2, ge=1)
    """Samples handed to one engine at once, in multiples of ``engine.max_num_seqs``; the rest waits
    in the router, where an engine that joins later can still get it."""


class RayConfig(SettingsModel):
    """The Ray cluster that hosts engines and trainer."""

    address: str | None = None
    """Cluster to join (``auto``, ``host:port``, ``ray://...``); absent starts a local one."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; the machine's when absent."""
    object_store_mib: int = Field(default=256, ge=80)
    """Object store of a local cluster."""


class ScoringConfig(SettingsModel):
    """The reward workers."""

    num_workers: int = Field(default=1, ge=1)
    timeout_s: float = Field(default=10.0, gt=0)
    """Per sample; a worker that takes longer is killed and replaced."""
    rewards: dict[str, str] = Field(default_factory=dict)
    """User rewards: name -> ``module:function``."""
