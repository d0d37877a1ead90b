"""The output of ``slipstream rollout``: whole lines, each prompt once, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import ConfigurationError, SlipstreamError
from shared.schemas.rollouts import RolloutGroup

RECORD_HEAD = b'{"prompt_id": "'
"""How every line begins, and with it what a crash may have left of one."""

_BEING_LOCKED = (errno.EAGAIN, errno.EACCES)


class ResultFile:
    """A context manager around the file; what is in it already is kept.

    After a crash the last line may be cut off anywhere. It is removed when the file is opened, so
    that its prompt counts as missing.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigurationError: it cannot be written, holds something else than results, or another
                command writes it now.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as exc:
            raise ConfigurationError(f"--output {path}: {exc.strerror}", param="--output") from exc
        try:
            self._lock()
            self.finished = self._read()
        except BaseException:  # an interrupt, too: the lock goes with the descriptor
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def add(self, prompt_id: str, group: RolloutGroup) -> None:
        """Append one result.

        Raises:
            SlipstreamError: it cannot be written; nothing of it is left in the file.
        """
        record = {"prompt_id": prompt_id, **group.model_dump(mode="json")}
        line = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except BaseException as exc:
            # A full disk, or Ctrl-C in the middle of it.
            os.ftruncate(self._descriptor, size)
            if isinstance(exc, OSError):
                raise SlipstreamError(
                    f"--output {self.path}: {exc.strerror}; {len(self.finished)} results are in "
                    "it, the same command goes on from there"
                ) from exc
            raise
        self.finished.add(prompt_id)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno in _BEING_LOCKED:
                raise ConfigurationError(
                    f"--output {self.path}: another `slipstream rollout` is writing it",
                    param="--output",
                ) from exc
            # A file system without locks: one writer is then up to whoever starts them.

    def _read(self) -> set[str]:
        """Ids of the results so far."""
        finished: set[str] = set()
        num_bytes = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and _may_be_cut(line):
                    os.ftruncate(self._descriptor, num_bytes)
                    break
                num_bytes += len(line)
                finished.add(self._id_in(line, number))
        return finished

    def _id_in(self, line: bytes, number: int) -> str:
        try:
            return str(json.loads(line)["prompt_id"])
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigurationError(
                f"--output {self.path} line {number} is not a result of `slipstream rollout`; "
                "give another file",
                param="--output",
            ) from exc


def _may_be_cut(line: bytes) -> bool:
    """Whether it is the beginning of a line of ours; a file of somebody else is left alone."""
    return line.startswith(RECORD_HEAD) or RECORD_HEAD.startswith(line)
