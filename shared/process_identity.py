"""Which process a pid means: pids are used again, and every container counts its own."""

from __future__ import annotations

import os
from pathlib import Path

ENDED_STATES = ("Z", "X")
"""Of ``/proc/<pid>/stat``: a zombie, and dead."""


def process_start_ticks(pid: int) -> int | None:
    """Start of a process in clock ticks since boot: with the pid, unique until the next boot. None
    where there is none that can be looked up."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def process_lives(pid: int, start_ticks: int) -> bool:
    """Whether this very process is there, or may be: it cannot be looked up. One that has ended and
    that nobody has waited for yet, as in containers without an init process, is not."""
    fields = _stat_fields(pid)
    if fields is None:
        return Path(f"/proc/{pid}").exists()
    return int(fields[19]) == start_ticks and fields[0] not in ENDED_STATES


def _stat_fields(pid: int) -> list[str] | None:
    """From the state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses and may itself hold spaces and parentheses.
    return text.rpartition(")")[2].split()


def pid_namespace() -> int:
    """Tells this container's pids from another's."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def boot_id() -> str:
    """Tells this boot of this host from any other: the head of the kernel's boot id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0"
