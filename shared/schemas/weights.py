"""``/v1/weights``: publishing a new version of the policy and seeing where it stands."""

from __future__ import annotations

from pydantic import Field

from shared.schemas.base import WireModel
from shared.types import TransportKind


class TensorEntry(WireModel):
    """One tensor of a push, as it lies in the safetensors file."""

    name: str = Field(min_length=1)
    dtype: str
    """safetensors dtype name: ``F32``, ``BF16``, ``F16``."""
    shape: list[int]
    num_bytes: int = Field(ge=0)
    digest: str
    """xxh3-128 of the raw bytes, hexadecimal."""


class WeightManifest(WireModel):
    """What a push contains: enough to refuse it before anything is served from it."""

    segment: str = Field(pattern=r"^slipstream-[A-Za-z0-9._-]+\.safetensors$")
    """File name inside the server's own ``weights.shared_memory_dir``; never a path."""
    tensors: list[TensorEntry] = Field(min_length=1)


class PublishRequest(WireModel):
    """Body of ``POST /v1/weights``."""

    version: int = Field(ge=1, lt=2**63)
    base_version: int = Field(ge=0, lt=2**63)
    """The committed version the trainer believes in; a mismatch answers 409."""
    transport: TransportKind = TransportKind.SHARED_MEMORY
    manifest: WeightManifest


class EngineCommitTimings(WireModel):
    """Seconds one engine spent on a push. Generation stands still during ``paused_s`` only."""

    engine_id: str
    stage_s: float
    """Mapping the file, checking names, shapes and dtypes against the model."""
    pause_s: float
    load_s: float
    """Target weights into place."""
    requantize_s: float
    """Drafter rebuilt from the same bytes."""
    resume_s: float
    paused_s: float
    """From asking for the pause to the end of the resume."""


class PublishResponse(WireModel):
    """Answer of a push: by then every serving engine is on ``version``."""

    version: int
    verify_s: float
    """Digests and finiteness, once per host."""
    total_s: float
    num_bytes: int
    engines: list[EngineCommitTimings]
    engines_removed: list[str] = Field(default_factory=list)
    """Engines that failed inside the commit window and were taken out."""


class EngineVersions(WireModel):
    """Which weights one engine serves and drafts with."""

    engine_id: str
    target_version: int
    drafter_version: int


class WeightHistoryEntry(WireModel):
    """One push, committed or refused."""

    version: int
    committed: bool
    total_s: float
    error: str | None = None


class WeightsResponse(WireModel):
    """Answer of ``GET /v1/weights``."""

    committed_version: int
    engines: list[EngineVersions]
    history: list[WeightHistoryEntry]
    """The latest pushes, oldest first."""
