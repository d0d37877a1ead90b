"""``/livez``, ``/readyz`` and ``/version``: what an operator's probes read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.schemas.base import WireModel


class LivezResponse(WireModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class ReadyzResponse(WireModel):
    """At least one engine can take work."""

    status: Literal["ready"] = "ready"
    num_ready_engines: int
    """Engines in SERVING, PAUSED or SYNCING."""
    num_engines: int
    target_count: int
    quarantined_pools: list[str] = Field(default_factory=list)
    """Pools that lost too many engines and replace none until an operator asks for a count."""


class VersionResponse(WireModel):
    """What runs here."""

    version: str
    vllm_version: str | None
    python_version: str
    model: str
    vocab_size: int
    max_model_len: int
    rewards: list[str]
    """Names ``reward.name`` may take."""
