"""Takes segments from trainers on other nodes into the server's directory.

A plain class; ``ray_transport`` makes it an actor on the server's node. The files carry this
process's pid: what it leaves when it is killed is swept like anybody's.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rollout_server.weights.transports.incoming import IncomingFile
from shared.clock import Clock, SystemClock
from shared.errors import WeightTransferError
from shared.weights import segment_name, sweep_stale_segments

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Upload:
    """One segment of one trainer."""

    upload_id: str
    file: IncomingFile
    version: int
    last_touched_s: float
    is_complete: bool = False


class SegmentReceiver:
    """The latest trainer to begin is the one that writes: it supersedes one that hangs or died.

    Args:
        directory: ``weights.shared_memory_dir`` of the server's node.
        idle_limit_s: after so long without a bucket, a half segment is of a dead trainer.
        kept_limit_s: after so long, nobody is going to push a complete one any more.
    """

    def __init__(
        self,
        directory: str,
        *,
        idle_limit_s: float,
        kept_limit_s: float,
        clock: Clock | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._idle_limit_s = idle_limit_s
        self._kept_limit_s = kept_limit_s
        self._clock = clock or SystemClock()
        self._uploads: dict[str, _Upload] = {}
        self._lock = threading.Lock()
        """``expire`` is called from a thread of its own."""
        for name in sweep_stale_segments(self._directory):
            logger.info("removed the weight segment %s of a process that is gone", name)

    def begin(self, version: int, num_bytes: int) -> tuple[str, str]:
        """Make room for a segment. Returns the upload's id and the segment's name.

        Half segments of others are removed, and a complete one of the same version.

        Raises:
            WeightTransferError: too little room, or the file cannot be made.
        """
        with self._lock:
            for upload in list(self._uploads.values()):
                if not upload.is_complete or upload.version == version:
                    logger.warning("version %d: a later upload supersedes it", upload.version)
                    self._drop(upload)
            path = self._directory / segment_name(os.getpid(), version)
            upload = _Upload(
                upload_id=uuid.uuid4().hex,
                file=IncomingFile(path, num_bytes),
                version=version,
                last_touched_s=self._clock.monotonic_s(),
            )
            self._uploads[upload.upload_id] = upload
            return upload.upload_id, path.name

    def append(self, upload_id: str, offset: int, bucket: npt.NDArray[np.uint8]) -> None:
        """Take the next bytes.

        Raises:
            WeightTransferError: they are not the next ones, or this upload was superseded.
        """
        with self._lock:
            upload = self._upload(upload_id)
            try:
                upload.file.append(offset, bucket.data)
            except WeightTransferError:
                self._drop(upload)
                raise
            upload.last_touched_s = self._clock.monotonic_s()

    def finish(self, upload_id: str) -> None:
        """The segment is complete: it may be pushed now.

        Raises:
            WeightTransferError: bytes are missing, or this upload was superseded.
        """
        with self._lock:
            upload = self._upload(upload_id)
            try:
                upload.file.finish()
            except WeightTransferError:
                self._drop(upload)
                raise
            upload.is_complete = True
            upload.last_touched_s = self._clock.monotonic_s()

    def discard(self, upload_id: str) -> None:
        """The trainer does not need it any more, or gave up. May be called again."""
        with self._lock:
            upload = self._uploads.get(upload_id)
            if upload is not None:
                self._drop(upload)

    def expire(self) -> None:
        """Remove what a trainer that died has left."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            for upload in list(self._uploads.values()):
                limit_s = self._kept_limit_s if upload.is_complete else self._idle_limit_s
                if now_s - upload.last_touched_s > limit_s:
                    logger.warning("version %d: its trainer is gone, removed", upload.version)
                    self._drop(upload)

    def close(self) -> None:
        """Remove everything."""
        with self._lock:
            for upload in list(self._uploads.values()):
                self._drop(upload)

    def _upload(self, upload_id: str) -> _Upload:
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise WeightTransferError(
                "this upload of weights is not known any more: another trainer began one, the "
                "receiver was started again, or nothing came for "
                f"{self._idle_limit_s:g} s (weights.transfer_timeout_s)"
            )
        return upload

    def _drop(self, upload: _Upload) -> None:
        upload.file.abandon()
        del self._uploads[upload.upload_id]
