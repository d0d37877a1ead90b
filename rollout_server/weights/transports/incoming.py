"""A file that arrives bucket by bucket, and appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from shared.errors import WeightTransferError
from shared.segment_writer import PARTIAL_SUFFIX, check_free_space, write_all


class IncomingFile:
    """Takes every byte once and in order. One sender; an error leaves nothing of the file."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """
        Raises:
            WeightTransferError: too little room, or the file cannot be made.
        """
        self.path = path
        self._num_bytes = num_bytes
        self._position = 0
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            check_free_space(path.parent, num_bytes)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._partial, flags, 0o600)
        except OSError as exc:
            raise WeightTransferError(
                f"weight segment {path} ({num_bytes} bytes) cannot be made: {exc.strerror}; "
                "see weights.shared_memory_dir"
            ) from exc

    def append(self, offset: int, data: memoryview) -> None:
        """Write the next bytes.

        Raises:
            WeightTransferError: they are not the next ones or more than announced, or cannot be
                written. The file is gone then.
        """
        if self._descriptor < 0:
            raise WeightTransferError(f"weight segment {self.path.name} takes no more buckets")
        end = offset + data.nbytes
        if offset != self._position:
            problem = f"a bucket starts at byte {offset}, byte {self._position} is next"
        elif end > self._num_bytes:
            problem = f"a bucket ends at byte {end}, announced were {self._num_bytes}"
        else:
            try:
                write_all(self._descriptor, data)
                self._position = end
                return
            except OSError as exc:
                problem = f"bytes {offset} to {end} cannot be written: {exc.strerror}"
        self.abandon()
        raise WeightTransferError(f"weight segment {self.path.name} is given up: {problem}")

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            WeightTransferError: bytes are missing, or it cannot be renamed. The file is gone then.
        """
        if self._descriptor >= 0 and self._position == self._num_bytes:
            os.close(self._descriptor)
            self._descriptor = -1
            try:
                self._partial.rename(self.path)
                return
            except OSError as exc:
                problem = f"it cannot be renamed: {exc.strerror}"
        else:
            problem = f"{self._position} of {self._num_bytes} bytes have come"
        self.abandon()
        raise WeightTransferError(f"weight segment {self.path.name} is given up: {problem}")

    def abandon(self) -> None:
        """Remove what there is of it, complete or not. Never raises; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        for path in (self._partial, self.path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class LinkedFile:
    """The second name of a complete file that came another way. The first may go then."""

    def __init__(self, path: Path, source: Path) -> None:
        """
        Raises:
            WeightTransferError: the name cannot be made.
        """
        self.path = path
        try:
            os.link(source, path, follow_symlinks=False)
        except OSError as exc:
            raise WeightTransferError(
                f"weight segment {source.name} cannot be linked as {path.name}: {exc.strerror}"
            ) from exc

    def abandon(self) -> None:
        """Remove this name. Never raises; may be called again."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
