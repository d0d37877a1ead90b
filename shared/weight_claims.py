"""Claims: which weight segments of dead servers are still wanted.

A server that is killed leaves its committed weights in shared memory, where its next start looks
for them. A claim beside such a segment names the record that refers to it; as long as the record
does, sweeping leaves the segment alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path

CLAIM_SUFFIX = ".claim"
MAX_CLAIM_BYTES = 4096
MAX_RECORD_BYTES = 1 << 26


def write_claim(segment: Path, record_path: Path) -> None:
    """Claim a segment for the record that will refer to it.

    Raises:
        OSError: the claim cannot be written.
    """
    _claim_path(segment).write_text(str(record_path.absolute()), encoding="utf-8")


def remove_claim(segment: Path) -> None:
    """Withdraw a claim, if there is one. Never raises: an orphan is swept."""
    with contextlib.suppress(OSError):
        _claim_path(segment).unlink(missing_ok=True)


def is_claimed(segment: Path) -> bool:
    """Whether a record still refers to this segment."""
    try:
        record_path = _read_own_file(_claim_path(segment), MAX_CLAIM_BYTES)
        record = json.loads(_read_own_file(Path(record_path), MAX_RECORD_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("path") == str(segment)


def segment_of(claim: Path) -> Path:
    """The segment that a claim is beside."""
    return claim.with_name(claim.name.removesuffix(CLAIM_SUFFIX))


def _read_own_file(path: Path, limit_bytes: int) -> str:
    """Text of a regular file of this user; the directory may be anybody's to write in.

    Raises:
        OSError: missing, another user's, too large, a link, a pipe or the like.
        ValueError: not UTF-8.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise OSError(f"{path} is not a regular file of this user")
        if facts.st_size > limit_bytes:
            raise OSError(f"{path} has {facts.st_size} bytes, more than {limit_bytes}")
        return file.read().decode()


def _claim_path(segment: Path) -> Path:
    return segment.with_name(segment.name + CLAIM_SUFFIX)
