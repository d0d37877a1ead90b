"""The committed weights as a file the server owns, and how a pushed file becomes one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from shared.errors import WeightTransferError, WeightVerificationError
from shared.schemas.weights import WeightManifest
from shared.weights import SegmentKind, segment_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedSnapshot:
    """What an engine that joins later is brought up to date with."""

    version: int
    path: str
    """The server's own hard link; valid until the next commit has ended."""
    manifest: WeightManifest


def adopt_segment(directory: Path, segment: str, version: int) -> Path:
    """Give a pushed file a second name of the server's own, without copying.

    From then on the trainer may remove its name, and a restarted trainer may reuse it.

    Raises:
        WeightVerificationError: there is no such file.
        WeightTransferError: the link cannot be made.
    """
    # The manifest's pattern forbids slashes, so the name cannot lead out of the directory; a
    # symbolic link is linked as such and refused by the verification, which follows none.
    adopted = directory / segment_name(os.getpid(), version, SegmentKind.SERVER)
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
    return adopted


def remove_segment(path: str | Path) -> None:
    """Remove a file of the server's own. Never raises: a leftover does no harm to a push."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("weight segment %s cannot be removed: %s", path, exc.strerror)
