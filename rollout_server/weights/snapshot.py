"""The committed weights as a file the server owns, and how a pushed file becomes one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.errors import WeightTransferError, WeightVerificationError
from shared.schemas.weights import WeightManifest
from shared.segment_writer import PARTIAL_SUFFIX, sync_directory
from shared.weight_claims import remove_claim, write_claim
from shared.weights import SegmentKind, segment_name

logger = logging.getLogger(__name__)


KEPT_PREFIX = "slipstream-kept-"
"""Of the files that ``move_to`` makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedSnapshot:
    """What an engine that joins later is brought up to date with."""

    version: int
    path: str
    """The server's own file (a hard link of what was pushed); valid until the next commit has
    ended."""
    manifest: WeightManifest


def adopt_segment(directory: Path, segment: str, adopted: Path, record_path: Path) -> None:
    """Give a pushed file a second name of the server's own, without copying, and claim it.

    From then on the trainer may remove its name, and a restarted trainer may reuse it.

    Args:
        adopted: the new name, in the same directory.
        record_path: of the record that will refer to it once it is committed.

    Raises:
        WeightVerificationError: there is no such file.
        WeightTransferError: the link cannot be made.
    """
    # The manifest's pattern forbids slashes, so the name cannot lead out of the directory; a
    # symbolic link is linked as such and refused by the verification, which follows none.
    try:
        os.link(directory / segment, adopted, follow_symlinks=False)
    except FileNotFoundError as exc:
        raise WeightVerificationError(
            f"weight segment {segment} is not in weights.shared_memory_dir {directory}",
            param="manifest.segment",
        ) from exc
    except OSError as exc:
        raise WeightTransferError(
            f"weight segment {segment} cannot be linked as {adopted.name} in {directory}: "
            f"{exc.strerror}; trainer and server must share weights.shared_memory_dir as one user",
            param="manifest.segment",
        ) from exc
    claim_segment(adopted, record_path)


def claim_segment(path: Path, record_path: Path) -> None:
    """Keep a file of the server's own from being swept while the record refers to it.

    Raises:
        WeightTransferError: the claim cannot be written; the file is removed.
    """
    try:
        write_claim(path, record_path)
    except OSError as exc:
        remove_segment(path)
        raise WeightTransferError(
            f"weight segment {path.name} cannot be claimed in {path.parent}: {exc.strerror}"
        ) from exc


def remove_segment(path: str | Path) -> None:
    """Remove a file of the server's own. Never raises: a leftover does no harm to a push."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("weight segment %s cannot be removed: %s", path, exc.strerror)
    remove_claim(Path(path))


def retire_segment(path: str | Path, version: int) -> None:
    """Leave a superseded file for the next writer; of this server's spares it is the only one.
    Never raises."""
    path = Path(path)
    remove_spares(path.parent)
    try:
        path.rename(path.parent / segment_name(os.getpid(), version, SegmentKind.SPARE))
    except OSError as exc:
        logger.warning("weight segment %s cannot be kept as a spare: %s", path, exc.strerror)
        remove_segment(path)
    remove_claim(path)


def remove_spares(directory: Path) -> None:
    """Remove what this server left for the next writer. Never raises."""
    name = segment_name(os.getpid(), 0, SegmentKind.SPARE).removesuffix("-v0.safetensors")
    for spare in directory.glob(f"{name}-v*.safetensors"):
        remove_segment(spare)


def move_to(snapshot: CommittedSnapshot, directory: Path) -> CommittedSnapshot:
    """Copy a snapshot to a directory that outlives this process and this boot. Blocks.

    The file before stays; the caller removes it once the record refers to the new one.

    Raises:
        WeightTransferError: no room, or the directory cannot be written.
    """
    kept = directory / f"{KEPT_PREFIX}v{snapshot.version}.safetensors"
    partial = kept.with_name(kept.name + PARTIAL_SUFFIX)
    try:
        shutil.copyfile(snapshot.path, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(kept)
        sync_directory(directory)
    except OSError as exc:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise WeightTransferError(
            f"version {snapshot.version} cannot be kept in weights.state_dir {directory}: "
            f"{exc.strerror}"
        ) from exc
    return dataclasses.replace(snapshot, path=str(kept))
