"""An engine's footprint, kept in the very shared memory it is about.

A killed engine's files outlive it, and whoever knew of them may be gone too, or on another host: a
killed server, or one whose run is never started again. So each engine writes down what it has
beside it, from its first second on, and whoever starts or stops on the host later removes what the
dead have left (``sweep_dead_engines``).

Only what is provably of the dead is touched: records and files of this user, of this pid namespace,
whose processes have all ended, told from later ones of the same pids by their start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rollout_server.engine.footprint import (
    EXIT_TIMEOUT_S,
    MAPPED_PREFIXES,
    OPENMP_FILE,
    SHARED_MEMORY,
    is_own,
    own_footprint,
)
from shared.process_identity import pid_namespace, process_lives, process_start_ticks

LOGGER = logging.getLogger(__name__)

NAME_PREFIX = "slipstream.engine."
NAME = re.compile(
    r"slipstream\.engine\.(?P<pid>[0-9]+)\.(?P<start>[0-9]+)\.(?P<namespace>[0-9]+)"
    r"\.json(?:\.partial)?"
)
INTERVAL_S = 1.0
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recorded:
    """What a record says."""

    processes: tuple[tuple[int, int], ...]  # (pid, start in clock ticks)
    files: tuple[str, ...]  # names in shared memory


class FootprintRecord:
    """Of the calling process, which hosts an engine, and of everything below it."""

    def __init__(self, directory: Path = SHARED_MEMORY) -> None:
        pid = os.getpid()
        owner = f"{pid}.{process_start_ticks(pid) or 0}.{pid_namespace()}"
        self._path = directory / f"{NAME_PREFIX}{owner}.json"
        self._lock = threading.Lock()
        self._last: _Recorded | None = None

    def write(self) -> None:
        """As of now. Never raises: without the record nothing is wrong until the engine is killed.

        What was seen once stays in it: a child that is killed is no longer seen, its files are.
        """
        with self._lock:
            try:
                now = _with_earlier(self._last, _own())
                if now == self._last:
                    return
                partial = self._path.with_name(self._path.name + ".partial")
                text = json.dumps({"processes": now.processes, "files": now.files})
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                partial.replace(self._path)
                self._last = now
            except OSError as exc:
                LOGGER.warning("footprint %s not written: %s", self._path, exc.strerror)

    def remove(self) -> None:
        """The engine has shut down. Of children that had to be killed for that, OpenMP's files go;
        what this process itself would leave if it were killed now, as Ray's actors are, stays on
        record."""
        with self._lock, contextlib.suppress(OSError):
            directory, own = self._path.parent, os.getpid()
            if self._last is not None:
                ended = tuple(one for one in self._last.processes if not process_lives(*one))
                _remove_files(directory, _Recorded(processes=ended, files=()))
            if not any(directory.glob(OPENMP_FILE.format(pid=own))):
                self._last = None
                self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def kept_up(self, interval_s: float = INTERVAL_S) -> Iterator[None]:
        """Written again and again while vLLM starts its processes, and once more at the end."""
        is_over = threading.Event()

        def keep() -> None:
            while not is_over.wait(interval_s):
                self.write()

        self.write()
        keeper = threading.Thread(target=keep, name="footprint", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            is_over.set()
            keeper.join()
            self.write()


def sweep_dead_engines(directory: Path = SHARED_MEMORY) -> list[str]:
    """Remove what engines that are dead have left on this host; names of the files removed.

    Blocks for up to ``EXIT_TIMEOUT_S`` for each one whose processes are just ending: call it in a
    thread.
    """
    removed: list[str] = []
    for path in sorted(directory.glob(f"{NAME_PREFIX}*")):
        name = NAME.fullmatch(path.name)
        if (
            name is None
            or int(name["namespace"]) != pid_namespace()
            or not is_own(path, stat.S_ISREG)
        ):
            continue
        if process_lives(int(name["pid"]), int(name["start"])):
            continue
        recorded = _read(path)
        if recorded is not None:
            if not _have_ended(recorded.processes):
                continue  # nobody's business but the kernel's: the next sweep looks again
            removed += _remove_files(directory, recorded)
        path.unlink(missing_ok=True)
    if removed:
        LOGGER.info("removed what dead engines have left: %s", ", ".join(removed))
    return removed


def remove_own_traces(_actor: object = None, directory: Path = SHARED_MEMORY) -> None:
    """Runs inside an actor that has shut down and is killed next, which OpenMP does not survive to
    remove its file."""
    for path in directory.glob(OPENMP_FILE.format(pid=os.getpid())):
        if is_own(path, stat.S_ISREG):
            path.unlink(missing_ok=True)
    FootprintRecord(directory).remove()


def _own() -> _Recorded:
    footprint = own_footprint()
    starts = ((pid, process_start_ticks(pid)) for pid, _ in footprint.processes)
    return _Recorded(
        processes=tuple((pid, start) for pid, start in starts if start is not None),
        files=tuple(Path(file).name for file in footprint.shared_memory_files),
    )


def _with_earlier(earlier: _Recorded | None, later: _Recorded) -> _Recorded:
    if earlier is None:
        return later
    return _Recorded(
        processes=tuple(sorted({*earlier.processes, *later.processes})),
        files=tuple(sorted({*earlier.files, *later.files})),
    )


def _read(path: Path) -> _Recorded | None:
    """None: damaged, or half of it was written when its engine was killed."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return _Recorded(
            processes=tuple((int(pid), int(start)) for pid, start in fields["processes"]),
            files=tuple(str(name) for name in fields["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as exc:
        LOGGER.warning("footprint %s cannot be read: %r", path, exc)
        return None


def _remove_files(directory: Path, recorded: _Recorded) -> list[str]:
    """Only of the kinds an engine has, and only in this directory, whatever the record says."""
    paths = [
        directory / name
        for name in recorded.files
        if name.startswith(MAPPED_PREFIXES) and Path(name).name == name
    ]
    for pid, start in recorded.processes:
        if process_start_ticks(pid) in (None, start):  # else it is another's, and so is its file
            paths += directory.glob(OPENMP_FILE.format(pid=pid))
    own = [path for path in paths if is_own(path, stat.S_ISREG)]
    for path in own:
        path.unlink(missing_ok=True)
    return [path.name for path in own]


def _have_ended(processes: Iterable[tuple[int, int]]) -> bool:
    """Children end soon after the process that hosts their engine."""
    deadline_s = time.monotonic() + EXIT_TIMEOUT_S
    while any(process_lives(pid, start) for pid, start in processes):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_S)
    return True
