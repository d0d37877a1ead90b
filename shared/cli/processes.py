"""Child processes of the CLI: started in their own group, logged to a file, ended for certain."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from shared.config.loading import ENVIRONMENT_PREFIX, RESERVED_ENVIRONMENT

PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a service started with a resolved configuration file.

    Settings variables are left out: they are in the file already, and a child that applied them
    again would undo what the supervisor filled in.
    """
    source = os.environ if environment is None else environment
    kept = {
        name: value
        for name, value in source.items()
        if not name.startswith(ENVIRONMENT_PREFIX) or name in RESERVED_ENVIRONMENT
    }
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module`` attached to this terminal; its exit code, 130 after Ctrl-C."""
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=child_environment(),
        preexec_fn=_die_with_parent(),
    )
    # A terminal sends Ctrl-C to the child too, a process supervisor sends SIGTERM only to us:
    # either way the child ends itself and this process outlives it.
    old_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)
    old_sigterm = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, old_sigint)
        signal.signal(signal.SIGTERM, old_sigterm)
    return 130 if code in (-signal.SIGINT, -signal.SIGTERM) else abs(code)


class ChildProcess:
    """One service started by the supervisor, with everything that service starts itself."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        log_path: Path | None,
        extra_environment: Mapping[str, str] | None = None,
        output: int | None = None,
    ) -> None:
        """Args:
        name: for messages.
        log_path: file that gets stdout and stderr; None leaves them on the terminal.
        extra_environment: added to ``child_environment()``.
        output: descriptor that gets stdout where there is no log; None leaves it as ours.
        """
        self.name = name
        self.log_path = log_path
        self._log: IO[bytes] | None = log_path.open("ab") if log_path is not None else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log if self._log is not None else output,
            stderr=subprocess.STDOUT if self._log is not None else None,
            env=child_environment() | dict(extra_environment or {}),
            # An own session keeps Ctrl-C away from it: the supervisor decides the order of ending.
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Exit code, or None when it still runs after ``timeout_s``."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, timeout_s: float) -> int | None:
        """End it and all it started: SIGTERM, wait, then SIGKILL to what is left. Idempotent."""
        descendants = process_descendants(self.pid)
        if self.poll() is None:
            self._process.terminate()
            self.wait(timeout_s)
        # Ray and vLLM put workers into sessions of their own: a group signal would miss them.
        descendants |= process_descendants(self.pid)
        if self.poll() is None:
            self._process.kill()
        kill_processes(descendants)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self.wait(5.0)
        if self._log is not None:
            self._log.close()
            self._log = None
        return code

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of its log file."""
        return file_tail(self.log_path, num_lines) if self.log_path is not None else ""


def process_descendants(pid: int) -> set[psutil.Process]:
    """Children, their children and so on, as far as they exist."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def kill_processes(processes: set[psutil.Process], grace_s: float = 2.0) -> None:
    """Give the processes ``grace_s`` to follow their parent, then SIGKILL the rest.

    psutil compares creation times, so a pid that was given to somebody else is not touched.
    """
    _, alive = psutil.wait_procs(list(processes), timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)


def file_tail(path: Path, num_lines: int) -> str:
    """The last lines of a text file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 200 * num_lines))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])


def wait_for_exit(process: ChildProcess, deadline: float, poll_s: float = 0.2) -> int | None:
    """Exit code, or None when ``time.monotonic()`` passes ``deadline`` first."""
    while (code := process.poll()) is None and time.monotonic() < deadline:
        time.sleep(poll_s)
    return code


def _die_with_parent() -> Callable[[], None] | None:
    """A hook that makes the kernel send SIGTERM to the child should this process be killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def request_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return request_death_signal
