"""Which process a pid means: pids are used again, and every container counts its own."""

from __future__ import annotations

import os
from pathlib import Path


def process_start_ticks(pid: int) -> int | None:
    """Start of a process in clock ticks since boot: with the pid, unique until the next boot. None
    where there is none that can be looked up."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses and may itself hold spaces and parentheses.
    return int(fields.rpartition(")")[2].split()[19])


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
