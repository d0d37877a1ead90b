"""What a server leaves when it stops, and finds when it starts: the committed weights, or their
loss."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rollout_server.weights.commit_ledger import CommitLedger, CommitRecord
from rollout_server.weights.snapshot import (
    KEPT_PREFIX,
    CommittedSnapshot,
    adopt_segment,
    move_to,
    remove_segment,
)
from rollout_server.weights.verify import verify_segment
from shared.config.weights import WeightsConfig
from shared.errors import ConfigurationError, WeightTransferError
from shared.types import LostSnapshotPolicy, TransportKind
from shared.weights import SegmentKind, segment_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """Where a server goes on."""

    snapshot: CommittedSnapshot | None = None
    """None: from the model directory, at version 0."""
    last_version_used: int = 0


def recover(ledger: CommitLedger, on_loss: LostSnapshotPolicy, directory: Path) -> Recovered:
    """Find and check what is recorded as committed; remove what is kept beside it of earlier
    versions, which nothing refers to. Blocks; as long as verifying a push takes.

    A segment that a killed server left in ``directory`` becomes this server's own.

    Raises:
        ConfigurationError: the record is damaged, or its weights are lost and ``on_loss`` says
            that this is no reason to go on.
    """
    record = ledger.read()
    recovered = _recover(record, ledger, on_loss, directory)
    for kept in ledger.state_dir.glob(f"{KEPT_PREFIX}*"):
        if str(kept) != record.path:
            remove_segment(kept)
    return recovered


def _recover(
    record: CommitRecord, ledger: CommitLedger, on_loss: LostSnapshotPolicy, directory: Path
) -> Recovered:
    if record.path is None or record.manifest is None:
        return Recovered(last_version_used=max(record.version, record.last_version_used))
    snapshot = CommittedSnapshot(version=record.version, path=record.path, manifest=record.manifest)
    try:
        verify_segment(snapshot.path, snapshot.manifest)
        if Path(snapshot.path).parent == directory:
            snapshot = _take_over(snapshot, ledger, directory)
    except WeightTransferError as exc:
        return _lost(ledger, record, on_loss, exc)
    logger.info("weights: going on with version %d from %s", snapshot.version, snapshot.path)
    return Recovered(snapshot=snapshot, last_version_used=record.last_version_used)


def _take_over(
    snapshot: CommittedSnapshot, ledger: CommitLedger, directory: Path
) -> CommittedSnapshot:
    """The dead server's file under a name of this one, recorded before the old name goes."""
    old = Path(snapshot.path)
    adopted = directory / segment_name(os.getpid(), snapshot.version, SegmentKind.SERVER)
    adopt_segment(directory, old.name, adopted, ledger.record_path)
    taken = CommittedSnapshot(
        version=snapshot.version, path=str(adopted), manifest=snapshot.manifest
    )
    record = ledger.read()
    ledger.write(record.model_copy(update={"path": taken.path}))
    remove_segment(old)
    logger.info("weights: took over %s of a server that is gone (pid %d now)", old, os.getpid())
    return taken


def _lost(
    ledger: CommitLedger,
    record: CommitRecord,
    on_loss: LostSnapshotPolicy,
    error: WeightTransferError,
) -> Recovered:
    if on_loss is LostSnapshotPolicy.FAIL:
        raise ConfigurationError(
            f"version {record.version} is committed in {ledger.record_path}, but its weights are "
            f"lost: {error.message}. Set weights.lost_snapshot=model to serve model.path as "
            "version 0 instead; trainers then push from there",
            param="weights.lost_snapshot",
        ) from error
    logger.warning("weights: version %d is lost (%s)", record.version, error.message)
    last_version_used = max(record.version, record.last_version_used)
    ledger.write(CommitRecord(last_version_used=last_version_used))
    return Recovered(last_version_used=last_version_used)


def leave_behind(
    snapshot: CommittedSnapshot | None, ledger: CommitLedger, config: WeightsConfig
) -> None:
    """At the end of a server: keep what is committed where the next start finds it, or nothing.

    From shared memory it moves to the state directory, so that no memory stays taken. Blocks.
    """
    if not config.keep_on_stop:
        ledger.forget()
        if snapshot is not None:
            remove_segment(snapshot.path)
        return
    if snapshot is None or config.transport is TransportKind.FILESYSTEM:
        return  # nothing to keep, or its file lies on a disk and is recorded
    if Path(snapshot.path).parent == ledger.state_dir:
        return
    try:
        kept = move_to(snapshot, ledger.state_dir)
        ledger.write(CommitRecord(version=kept.version, path=kept.path, manifest=kept.manifest))
    except WeightTransferError as exc:
        logger.error("weights: version %d stays in memory: %s", snapshot.version, exc.message)
        return
    remove_segment(snapshot.path)
