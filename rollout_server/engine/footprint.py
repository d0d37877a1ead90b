"""What an engine's processes leave outside themselves, so that nothing stays when they are killed.

vLLM's message queues live in ``/dev/shm/psm_*``, what tensor-parallel ranks on a CPU hand each
other in ``/dev/shm/vllm_dist_*``, Python's semaphores in ``/dev/shm/sem.mp-*``, and Intel's OpenMP
runtime registers every process in ``/dev/shm/__KMP_REGISTERED_LIB_<pid>_*``; all of them stay
behind after a SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.process_identity import boot_id, pid_namespace

SHARED_MEMORY = Path("/dev/shm")
MAPPED_PREFIXES = ("psm_", "sem.mp-", "vllm_dist_")
OPENMP_FILE = "__KMP_REGISTERED_LIB_{pid}_*"
EXIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Processes of one engine, with start times (pids are reused), and its shared memory."""

    processes: tuple[tuple[int, float], ...]  # (pid, create time), the actor last
    shared_memory_files: tuple[str, ...]
    place: str = ""
    """Host and container whose pids and files these are; empty: the caller's own."""


def own_place() -> str:
    """Of the calling process: pids and files mean something only there."""
    return f"{boot_id()}.{pid_namespace()}"


def own_footprint() -> Footprint:
    """Of the calling process and everything below it."""
    actor = psutil.Process()
    processes = [*actor.children(recursive=True), actor]
    inodes: set[int] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            inodes.update(_mapped_inodes(process.pid))
    return Footprint(
        processes=tuple((process.pid, process.create_time()) for process in processes),
        shared_memory_files=tuple(sorted(_files_of(inodes))),
        place=own_place(),
    )


def _mapped_inodes(pid: int) -> Iterable[int]:
    """Inodes of the shared memory a process maps. Names in the map are no use: the C library
    creates a semaphore under a temporary name and then renames it."""
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
            yield int(fields[4])


def _files_of(inodes: set[int]) -> Iterable[str]:
    for entry in os.scandir(SHARED_MEMORY):
        with contextlib.suppress(OSError):
            if entry.name.startswith(MAPPED_PREFIXES) and entry.inode() in inodes:
                yield entry.path


def merged(earlier: Footprint | None, later: Footprint) -> Footprint:
    """Everything of both, the later one's actor last."""
    if earlier is None:
        return later
    gone = [process for process in earlier.processes if process not in later.processes]
    files = {*earlier.shared_memory_files, *later.shared_memory_files}
    return Footprint(
        processes=(*gone, *later.processes),
        shared_memory_files=tuple(sorted(files)),
        place=later.place,
    )


def remove_footprint(footprint: Footprint) -> None:
    """Wait for the processes to end, kill those that do not, remove their files.

    Of an engine on another host nothing is done: a process here may have its pid. What it leaves,
    the next engine there removes (``footprint_record.py``).

    Blocks for at most ``EXIT_TIMEOUT_S`` per process: call it in a thread.
    """
    if footprint.place not in ("", own_place()):
        return
    for pid, create_time in footprint.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if _is_reused(pid, create_time):
                continue
            try:
                process.wait(EXIT_TIMEOUT_S)
            except psutil.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for path in footprint.shared_memory_files:
        Path(path).unlink(missing_ok=True)
    for pid, create_time in footprint.processes:
        if _is_reused(pid, create_time):
            continue
        for leftover in SHARED_MEMORY.glob(OPENMP_FILE.format(pid=pid)):
            with contextlib.suppress(PermissionError):  # another user's, of another container
                leftover.unlink(missing_ok=True)


def is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Of this user and of that kind, and no link to such. Shared memory and the temporary directory
    are open to all: what others put there is neither obeyed nor removed.

    Args:
        is_kind: of the mode: ``stat.S_ISREG``, ``stat.S_ISDIR``.
    """
    try:
        facts = path.lstat()
    except OSError:
        return False
    return is_kind(facts.st_mode) and facts.st_uid == os.geteuid()


def _is_reused(pid: int, create_time: float) -> bool:
    """Whether another process has this id by now."""
    try:
        return psutil.Process(pid).create_time() != create_time
    except psutil.NoSuchProcess:
        return False
