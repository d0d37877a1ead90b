"""Is a process there? For tests that end processes which are not their children."""

from __future__ import annotations

from pathlib import Path


def is_alive(pid: int) -> bool:
    """False also for a zombie: it has ended, and only its parent has not looked yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return fields.rpartition(")")[2].split()[0] != "Z"
