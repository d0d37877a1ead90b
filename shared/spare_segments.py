"""Spare segments: files of superseded weights, whose memory the next version is written into.

Memory that the kernel has to find and zero page by page costs more than what is written into it. A
version that is superseded is not removed but renamed; whoever writes the next one takes it, if
nobody has it open or mapped any more. The kernel answers that: it grants a write lease
(``fcntl(2)``, ``F_SETLEASE``) only to the one and only holder of a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

SPARE_PREFIX = "slipstream-spare-"


def take_spare(directory: Path, taken: Path) -> int | None:
    """Take a spare of this user: renamed to ``taken``, in the same directory, whatever is there.

    Returns:
        Its descriptor, for writing from the start, with the old bytes still in it; None if there is
        no spare, or none that can be had. Then nothing is at ``taken`` that was a spare.
    """
    for spare in sorted(directory.glob(f"{SPARE_PREFIX}*")):
        try:
            os.rename(spare, taken)
        except OSError:
            continue  # another writer was faster, or it is another user's
        descriptor = _open_if_unused(taken)
        if descriptor is not None:
            return descriptor
        # Someone reads it: gone from the directory, it goes from memory when they are done.
        with contextlib.suppress(OSError):
            taken.unlink()
    return None


def spare_num_bytes(descriptor: int) -> int:
    """Memory that an open file has already."""
    return os.fstat(descriptor).st_blocks * 512


def _open_if_unused(path: Path) -> int | None:
    """A descriptor, if this is a regular file of this user's, under this one name, that nobody else
    has open or mapped."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        if (
            stat.S_ISREG(facts.st_mode)
            and facts.st_uid == os.geteuid()
            and stat.S_IMODE(facts.st_mode) == 0o600
            and facts.st_nlink == 1
        ):
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return descriptor
    except OSError:  # it is open elsewhere, or the file system has no leases
        pass
    os.close(descriptor)
    return None
