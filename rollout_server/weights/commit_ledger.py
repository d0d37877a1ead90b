"""The durable record of what is committed: one small file, replaced whole.

A push is committed at the moment its record has replaced the one before, and not earlier: a server
that dies before it starts again with the old version, one that dies after it with the new.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

from pydantic import ValidationError

from shared.errors import ConfigurationError, WeightTransferError
from shared.schemas.base import WireModel
from shared.schemas.weights import WeightManifest
from shared.segment_writer import sync_directory

logger = logging.getLogger(__name__)

RECORD_FILE = "committed.json"
LOCK_FILE = "lock"


class CommitRecord(WireModel):
    """What is committed, and where its bytes are."""

    format: int = 1
    version: int = 0
    path: str | None = None
    """The snapshot's file; None while the model directory is what is committed."""
    manifest: WeightManifest | None = None
    last_version_used: int = 0
    """Above ``version`` where the weights of that version were lost."""


class CommitLedger:
    """One server's record. Held exclusively: a second server on the same directory is refused."""

    def __init__(self, state_dir: Path) -> None:
        """
        Raises:
            ConfigurationError: the directory cannot be used, or another server holds it.
        """
        self.state_dir = state_dir
        self.record_path = state_dir / RECORD_FILE
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(
                state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as exc:
            raise ConfigurationError(
                f"weights.state_dir {state_dir} cannot be used: {exc.strerror}",
                param="weights.state_dir",
            ) from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise ConfigurationError(
                f"weights.state_dir {state_dir} is in use by another server",
                param="weights.state_dir",
            ) from exc

    def read(self) -> CommitRecord:
        """What is committed; version 0 where nothing was recorded yet.

        Raises:
            ConfigurationError: the record is damaged.
        """
        try:
            text = self.record_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return CommitRecord()
        except OSError as exc:
            raise ConfigurationError(
                f"{self.record_path} cannot be read: {exc.strerror}", param="weights.state_dir"
            ) from exc
        try:
            return CommitRecord.model_validate_json(text)
        except ValidationError as exc:
            raise ConfigurationError(
                f"{self.record_path} is damaged ({exc.error_count()} errors); remove it to start "
                "from model.path at version 0",
                param="weights.state_dir",
            ) from exc

    def write(self, record: CommitRecord) -> None:
        """Replace the record; on return it survives a power cut, or the log says that it may not.
        Blocks.

        Raises:
            WeightTransferError: the record before is still in place.
        """
        temporary = self.record_path.with_suffix(".partial")
        try:
            with temporary.open("wb") as file:
                file.write(record.model_dump_json().encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.record_path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise WeightTransferError(
                f"version {record.version} cannot be recorded in weights.state_dir "
                f"{self.state_dir}: {exc.strerror}"
            ) from exc
        try:
            sync_directory(self.state_dir)
        except OSError as exc:
            # The new record is in place and the next start reads it: this is no failed commit.
            logger.error(
                "weights: version %d is committed, but a power cut may take its record back: "
                "weights.state_dir %s cannot be synced: %s",
                record.version,
                self.state_dir,
                exc.strerror,
            )

    def forget(self) -> None:
        """Remove the record: the next start serves the model directory."""
        self.record_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another server have the directory. May be called again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
