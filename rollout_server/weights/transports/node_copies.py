"""The copies of the server's segments on one other node.

A plain class; ``ray_transport`` makes it an actor on that node. The files carry its pid, so those
of a server that was killed, and whose actors ended with it, are swept by the next one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rollout_server.weights.transports.incoming import IncomingFile, LinkedFile
from rollout_server.weights.verify import verify_segment
from shared.errors import WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.weights import SegmentKind, segment_name, sweep_stale_segments

logger = logging.getLogger(__name__)


class NodeCopies:
    """One sender, one version at a time.

    Args:
        directory: ``weights.shared_memory_dir``, of this node.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._files: dict[int, IncomingFile | LinkedFile] = {}
        for name in sweep_stale_segments(self._directory):
            logger.info("removed the weight segment %s of a process that is gone", name)

    def begin(self, version: int, num_bytes: int) -> None:
        """Make room for a version; what there is of it is removed.

        Raises:
            WeightTransferError: too little room, or the file cannot be made.
        """
        self.remove(version)
        self._files[version] = IncomingFile(self._path(version), num_bytes)

    def append(self, version: int, offset: int, bucket: npt.NDArray[np.uint8]) -> None:
        """Take the next bytes.

        Raises:
            WeightTransferError: they are not the next ones, or cannot be written.
        """
        self._file(version).append(offset, bucket.data)

    def finish(self, version: int, manifest: WeightManifest) -> str:
        """Verify what has come, on this node. Returns its path.

        Raises:
            WeightTransferError: bytes are missing or were damaged on the way.
        """
        file = self._file(version)
        try:
            file.finish()
            verify_segment(file.path, manifest)
        except WeightTransferError:
            self.remove(version)
            raise
        return str(file.path)

    def adopt(self, version: int, source: str, manifest: WeightManifest) -> str:
        """Make a file that a trainer has broadcast to this node a copy, and verify it. Returns its
        path; there is none where it is refused.

        Raises:
            WeightTransferError: it cannot be linked, or is not what the manifest says.
        """
        self.remove(version)
        # Linked before it is verified: what engines load is then the file that was checked.
        file = self._files[version] = LinkedFile(self._path(version), Path(source))
        try:
            verify_segment(file.path, manifest)
        except WeightTransferError:
            self.remove(version)
            raise
        return str(file.path)

    def holds(self, version: int) -> bool:
        """Whether a verified copy is there."""
        file = self._files.get(version)
        return file is not None and file.path.exists()

    def remove(self, version: int) -> None:
        """Remove a version, complete or not. May be called again."""
        file = self._files.pop(version, None)
        if file is not None:
            file.abandon()

    def close(self) -> None:
        """Remove everything."""
        for version in list(self._files):
            self.remove(version)

    def _file(self, version: int) -> IncomingFile:
        file = self._files.get(version)
        if not isinstance(file, IncomingFile):
            raise WeightTransferError(f"version {version} was not begun on this node")
        return file

    def _path(self, version: int) -> Path:
        return self._directory / segment_name(os.getpid(), version, SegmentKind.NODE)
