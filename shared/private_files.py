"""Reads files that hold secrets, and refuses those that others could read or have written."""

from __future__ import annotations

import os
import stat
from enum import IntFlag
from pathlib import Path

from shared.errors import ConfigurationError

MAX_PRIVATE_FILE_BYTES = 1024 * 1024


class OtherAccess(IntFlag):
    """Permission bits that a file with a secret must not have."""

    GROUP_AND_OTHERS = 0o077
    OTHERS = 0o007
    """For files that a group is commonly trusted with, such as TLS keys (``ssl-cert``)."""


def read_private_text(
    path: str | Path, setting: str, refused: OtherAccess = OtherAccess.GROUP_AND_OTHERS
) -> str:
    """Contents of a file that only its owner can read.

    Args:
        setting: the configuration key or variable that names the file, for messages.
        refused: permission bits that make the file unacceptable.

    Raises:
        ConfigurationError: it cannot be read, is open to others, belongs to another user, or is
            no text. The message never has any of the contents.
    """
    try:
        with open(path, "rb") as file:
            # Of the open file: what is checked is what is read.
            check_private(os.fstat(file.fileno()), path, setting, refused)
            content = file.read(MAX_PRIVATE_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigurationError(f"{setting} {path}: {exc.strerror}", param=setting) from exc
    if len(content) > MAX_PRIVATE_FILE_BYTES:
        raise ConfigurationError(
            f"{setting} {path} has more than {MAX_PRIVATE_FILE_BYTES} bytes", param=setting
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        # Without its cause: that one quotes the bytes.
        raise ConfigurationError(f"{setting} {path} is not UTF-8 text", param=setting) from None


def check_private(
    status: os.stat_result, path: str | Path, setting: str, refused: OtherAccess
) -> None:
    """Check type, owner and permissions.

    Raises:
        ConfigurationError: saying what is wrong and how to put it right.
    """
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"{setting} {path} is not a regular file", param=setting)
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"{setting} {path} belongs to user {status.st_uid}, who could change it; "
            f"it must belong to user {os.geteuid()} or root",
            param=setting,
        )
    if status.st_mode & refused:
        raise ConfigurationError(
            f"{setting} {path} has permissions {stat.S_IMODE(status.st_mode):04o}: others can "
            f"reach the secret in it; `chmod 600 {path}`",
            param=setting,
        )
