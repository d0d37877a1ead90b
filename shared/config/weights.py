"""How weight pushes travel, what running sequences see of them, and what survives a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from shared.config.base import SettingsModel
from shared.types import CommitPolicy, DeltaMode, LostSnapshotPolicy, PauseMode, TransportKind


class WeightsConfig(SettingsModel):
    """The weight path."""

    transport: TransportKind = TransportKind.SHARED_MEMORY
    """How the bytes travel."""
    shared_memory_dir: str = "/dev/shm"
    """Of ``shared_memory``, and of the copies of ``ray`` and ``nccl`` on every node."""
    keep_spare: bool = True
    """A superseded version's shared memory stays for the next push to be written into
    (``shared_memory``): finding new memory takes longer than writing. Between pushes, twice the
    size of the model lies in ``shared_memory_dir``, as during one. False frees it after each."""
    filesystem_dir: str | None = None
    """Of the transport ``filesystem``: seen under this path by trainer, server and engines."""
    delta: DeltaMode = DeltaMode.AUTO
    """When a trainer sends only what changed."""
    delta_max_share: float = Field(default=0.25, gt=0, le=1)
    """Of the tensors' bytes; where a delta would be longer, a trainer pushes every tensor."""
    bucket_mib: int = Field(default=256, ge=1)
    """The transports ``ray`` and ``nccl`` hold two of these at most on each side, in the object
    store and beside it."""
    bucket_timeout_s: float = Field(default=30.0, gt=0)
    """How long what is on its way may take from node to node (``ray``, ``nccl``)."""
    transfer_timeout_s: float = Field(default=300.0, gt=0)
    """How long a whole version may take to the nodes of all engines (``ray``, ``nccl``)."""
    pause_mode: PauseMode = PauseMode.KEEP
    """What a push does to running sequences."""
    recompute_kv: bool = False
    """Running sequences compute their KV again under the new weights before they go on
    (``pause_mode: keep``); else their old tokens keep the KV of the weights that made them."""
    commit_policy: CommitPolicy = CommitPolicy.QUORUM
    """How many engines have to load a push."""
    commit_quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of the engines that must load a push under ``commit_policy: quorum``."""
    stage_timeout_s: float = Field(default=60.0, gt=0)
    """How long verifying may take, and staging on an engine."""
    pause_timeout_s: float = Field(default=60.0, gt=0)
    """How long an engine may take to stand still."""
    commit_timeout_s: float = Field(default=60.0, gt=0)
    """How long an engine may take to load."""
    rebuild_timeout_s: float = Field(default=300.0, gt=0)
    """How long a drafter may take to follow a push, beside what runs; then its engine is replaced.
    The next push waits for it."""
    lock_timeout_s: float = Field(default=120.0, ge=0)
    """How long a second push waits for the first; 0 refuses it at once."""
    audit_every: int = Field(default=0, ge=0)
    """Compare every engine's live weights with the committed ones after so many pushes; 0: only
    when asked (``POST /v1/weights/audit``)."""
    audit_timeout_s: float = Field(default=300.0, gt=0)
    """How long an engine may take over an audit."""
    history_size: int = Field(default=100, ge=1)
    """Pushes that ``GET /v1/weights`` remembers."""
    state_dir: str | None = None
    """Where the committed version is recorded; ``<run_dir>/weights`` when absent."""
    keep_on_stop: bool = True
    """A server that is stopped leaves its last weights in ``state_dir`` for the next start. False
    forgets them: the next start serves the model directory as version 0."""
    lost_snapshot: LostSnapshotPolicy = LostSnapshotPolicy.FAIL
    """What a start does whose committed weights are gone."""

    @property
    def directory(self) -> Path:
        """Where trainers put their segments."""
        if self.transport is TransportKind.FILESYSTEM:
            assert self.filesystem_dir is not None, "checked when the configuration was read"
            return Path(self.filesystem_dir)
        return Path(self.shared_memory_dir)

    @property
    def spares_dir(self) -> Path | None:
        """Where superseded versions are left for the next; None: nowhere."""
        is_kept = self.keep_spare and self.transport is TransportKind.SHARED_MEMORY
        return self.directory if is_kept else None

    @property
    def spans_nodes(self) -> bool:
        """Trainer, server and engines need not see the same files."""
        return self.transport in (TransportKind.RAY, TransportKind.NCCL)

    @property
    def longest_push_s(self) -> float:
        """Drafters that follow the push before, verifying and staging, pausing and loading, and at
        worst loading the version before."""
        load_s = self.pause_timeout_s + self.commit_timeout_s
        spread_s = self.transfer_timeout_s + self.stage_timeout_s if self.spans_nodes else 0.0
        if self.transport is TransportKind.NCCL:
            spread_s += self.stage_timeout_s  # what was broadcast is verified first
        work_s = 3 * self.stage_timeout_s + spread_s + 2 * load_s + self.commit_timeout_s
        return self.rebuild_timeout_s + work_s

    @property
    def piece_bytes(self) -> int:
        """What ``ray`` and ``nccl`` move at a time: half a bucket. One piece is being filled, one
        is on its way, and Ray frees the one before a little after nobody needs it any more."""
        return self.bucket_mib << 19

    @property
    def longest_answer_s(self) -> float:
        """A push that waits for another one first."""
        return self.lock_timeout_s + self.longest_push_s

    @property
    def segment_kept_s(self) -> float:
        """For how long a receiver keeps a complete segment that its trainer does not take back. A
        trainer may wait for one answer in vain and then for that to the same push."""
        return 2 * self.longest_answer_s

    @field_validator("transport", mode="before")
    @classmethod
    def ipc_is_refused(cls, value: Any) -> Any:
        if value == "ipc":
            raise ValueError(
                "weights.transport ipc does not exist: CUDA IPC hands over the trainer's own "
                "memory, which cannot be verified before engines load it, nor kept for a restart, "
                "for engines that join or for going back; copied to a file first, it is "
                "shared_memory with a GPU context more. On one host, use weights.transport "
                "shared_memory (docs/weights.md)"
            )
        return value

    @model_validator(mode="after")
    def filesystem_needs_a_directory(self) -> Self:
        if self.transport is TransportKind.FILESYSTEM and self.filesystem_dir is None:
            raise ValueError("weights.transport filesystem needs weights.filesystem_dir")
        return self

    @model_validator(mode="after")
    def only_kept_sequences_have_kv(self) -> Self:
        if self.recompute_kv and self.pause_mode is not PauseMode.KEEP:
            raise ValueError(
                f"weights.recompute_kv is for weights.pause_mode keep; under "
                f"{self.pause_mode.value} no sequence goes on after a push"
            )
        return self
