"""``/v1/weights``: publishing a new version of the policy and seeing where it stands."""

from __future__ import annotations

from pydantic import Field

from shared.schemas.base import Checked, WireModel
from shared.types import PushPhase, SegmentEncoding, TransportKind


class TensorEntry(WireModel):
    """One tensor of a push, as it lies in the safetensors file."""

    name: str = Field(min_length=1)
    dtype: str
    """safetensors dtype name: ``F32``, ``BF16``, ``F16``."""
    shape: Checked[int]
    num_bytes: int = Field(ge=0)
    digest: str
    """xxh3-128 of the raw bytes, hexadecimal."""


class WeightManifest(WireModel):
    """What a push contains: enough to refuse it before anything is served from it."""

    segment: str = Field(pattern=r"^slipstream-[A-Za-z0-9._-]+\.safetensors$")
    """File name inside the server's own ``weights.shared_memory_dir``; never a path."""
    encoding: SegmentEncoding = SegmentEncoding.FULL
    """``delta``: the file holds what changed since ``base_version``."""
    tensors: Checked[TensorEntry] = Field(min_length=1)
    """Every tensor of the version, however many of them the file holds."""


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
    requantize_s: float | None
    """Drafter rebuilt from the same bytes. None where that follows the push, between the steps of
    what runs (``drafter.rebuild``): ``GET /v1/weights`` says when it is done."""
    resume_s: float
    paused_s: float
    """From asking for the pause to the end of the resume."""


class PublishResponse(WireModel):
    """Answer of a push: by then every serving engine is on ``version``. Their drafters may still
    follow; until one has, its engine drafts nothing."""

    version: int
    verify_s: float
    """Digests and finiteness, once per host."""
    total_s: float
    num_bytes: int
    phases_s: dict[str, float] = Field(default_factory=dict)
    """Seconds of each phase over all engines: ``verifying``, ``staging``, ``loading``,
    ``recording``, ``resume``."""
    segment: str | None = None
    """The server's own file of this version, in the directory of the transport: what a delta to the
    next version can be made from."""
    engines: list[EngineCommitTimings]
    engines_removed: list[str] = Field(default_factory=list)
    """Engines that failed inside the commit window and are replaced."""


class EngineVersions(WireModel):
    """Which weights one engine serves and drafts with."""

    engine_id: str
    target_version: int
    drafter_version: int
    """The target's, unless the drafter's rebuild is under way, or not due
    (``drafter.requantize_every``)."""
    requantize_s: float | None = None
    """Of the drafter's last rebuild. None while one is under way."""


class WeightHistoryEntry(WireModel):
    """One push, committed or refused."""

    version: int
    committed: bool
    total_s: float
    error: str | None = None


class EngineAudit(WireModel):
    """What came of comparing one engine's live weights with the committed ones."""

    engine_id: str
    version: int
    num_equal: int
    """Parameters, and layers of the drafter, that are what they should be."""
    num_skipped: int
    """That cannot be compared by name (experts; tensors that a model renames or transposes)."""
    different: list[str]
    """Names of those that are not; such an engine is replaced."""
    audit_s: float


class AuditRequest(WireModel):
    """Body of ``POST /v1/weights/audit``; may be left out."""


class AuditResponse(WireModel):
    """Answer of ``POST /v1/weights/audit``."""

    version: int
    is_intact: bool
    """Nothing was found different, on any engine."""
    engines: list[EngineAudit]
    engines_removed: list[str] = Field(default_factory=list)
    """Engines with other weights than the committed ones: they are replaced."""
    errors: dict[str, str] = Field(default_factory=dict)
    """Engines that could not be asked, and why; they go on."""


class PushStatus(WireModel):
    """Where the latest push stands."""

    version: int
    phase: PushPhase


class WeightsResponse(WireModel):
    """Answer of ``GET /v1/weights``."""

    committed_version: int
    committed_segment: str | None = None
    """The server's own file of that version, as in the answer of its push; null where there was no
    push, or the file lies elsewhere."""
    last_version_used: int = 0
    """Above ``committed_version`` where committed weights were lost: pushes start above it."""
    push: PushStatus | None = None
    """The latest push, running or ended; null before the first."""
    engines: list[EngineVersions]
    history: list[WeightHistoryEntry]
    """The latest pushes, oldest first."""
    receiver: str | None = None
    """Where trainers send segments under the transports ``ray`` and ``nccl``: an actor,
    ``namespace/name``."""
    node_receivers: list[str] = Field(default_factory=list)
    """Who takes part in a broadcast beside ``receiver`` under the transport ``nccl``: an actor on
    each other node that has engines."""
