"""What an engine's processes leave outside themselves, so that nothing stays when they are killed.

vLLM's message queues live in ``/dev/shm/psm_*``, Python's semaphores in ``/dev/shm/sem.mp-*``, and
Intel's OpenMP runtime registers every process in ``/dev/shm/__KMP_REGISTERED_LIB_<pid>_*``; all of
them stay behind after a SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
MAPPED_PREFIXES = ("psm_", "sem.mp-")
OPENMP_FILE = "__KMP_REGISTERED_LIB_{pid}_*"
EXIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Processes of one engine, with start times (pids are reused), and its shared memory."""

    processes: tuple[tuple[int, float], ...]  # (pid, create time), the actor last
    shared_memory_files: tuple[str, ...]


def own_footprint() -> Footprint:
    """Of the calling process and everything below it."""
    actor = psutil.Process()
    processes = [*actor.children(recursive=True), actor]
    files: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            files.update(_mapped_files(process.pid))
    return Footprint(
        processes=tuple((process.pid, process.create_time()) for process in processes),
        shared_memory_files=tuple(sorted(files)),
    )


def _mapped_files(pid: int) -> Iterable[str]:
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2].removesuffix(" (deleted)")
        name = Path(f"/{path}").name
        if Path(f"/{path}").parent == SHARED_MEMORY and name.startswith(MAPPED_PREFIXES):
            yield f"/{path}"


def remove_footprint(footprint: Footprint) -> None:
    """Wait for the processes to end, kill those that do not, remove their files.

    Blocks for at most ``EXIT_TIMEOUT_S`` per process: call it in a thread.
    """
    for pid, create_time in footprint.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() != create_time:
                continue  # the id belongs to somebody else by now
            try:
                process.wait(EXIT_TIMEOUT_S)
            except psutil.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for path in footprint.shared_memory_files:
        Path(path).unlink(missing_ok=True)
    for pid, _ in footprint.processes:
        for leftover in SHARED_MEMORY.glob(OPENMP_FILE.format(pid=pid)):
            leftover.unlink(missing_ok=True)
