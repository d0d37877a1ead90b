"""Runs tests against code: ``python -m rollout_server.scoring.code_runner <pid of the parent>``.

Started by the reward ``code_tests`` with a job on standard input; writes one report to standard
output. This process never runs what it was given. Each test has a child that runs the code and then
the test, and says at the end that it got there; a child that ends, or is ended, without saying so
has failed. Before the next test, and before the report, nothing a child has started is left.

What runs here has no network, no files to write, bounded memory and CPU time, and dies with the
worker. It is confined, not locked up: see ``docs/security.md``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rollout_server.scoring.confinement import MIB, WorkerLimits, end_with_parent

PR_SET_CHILD_SUBREAPER = 36
MAX_ERROR_CHARS = 300
MAX_VERDICT_BYTES = 64 * 1024


def main() -> None:
    """Read the job, run its tests, write the report."""
    end_with_parent(int(sys.argv[1]))
    report_fd = os.dup(1)
    job = json.load(sys.stdin)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        _confine(job["max_memory_mib"])
        report: dict[str, Any] = {"errors": run_tests(job, report_fd)}
    except (OSError, ValueError) as exc:
        report = {"refused": str(exc)}
    with os.fdopen(report_fd, "w") as file:
        json.dump(report, file)


def _confine(max_memory_mib: int) -> None:
    """For good, for this process and its children.

    Raises:
        OSError: the system refuses; nothing may run then.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:  # scoring.max_memory_mib
        max_memory_mib = min(max_memory_mib, hard // MIB)
    WorkerLimits(max_memory_mib=max_memory_mib, denies_network=True).apply()
    # Against write(): what is there already can be changed through mmap.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Orphans of the tests become our children, so that we find them.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Neither our own modules nor what lies in the server's directories is for the code to import.
    for name in [name for name in sys.modules if name.startswith("rollout_server")]:
        del sys.modules[name]
    kept = tuple(os.path.join(prefix, "") for prefix in {sys.prefix, sys.base_prefix})
    sys.path[:] = [entry for entry in sys.path if entry.startswith(kept)]


def run_tests(job: dict[str, Any], report_fd: int) -> list[str | None]:
    """What went wrong with each test; None for those that passed.

    Args:
        report_fd: not for the children.

    Raises:
        ValueError: a test is not Python.
    """
    tests = [_compiled(index, source) for index, source in enumerate(job["tests"])]
    end_s = time.monotonic() + job["timeout_s"]
    errors: list[str | None] = []
    for test in tests:
        left_s = min(job["test_timeout_s"], end_s - time.monotonic())
        if left_s <= 0:
            errors.append("not run: timeout_s is used up")
            continue
        errors.append(_run_test(job["code"], test, left_s, report_fd))
    return errors


def _compiled(index: int, source: str) -> Any:
    try:
        return compile(source, f"<test {index}>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise ValueError(f"test {index} is not Python: {exc}") from exc


def _run_test(code: str, test: Any, timeout_s: float, report_fd: int) -> str | None:
    read_fd, write_fd = os.pipe()
    # Known to this process and the child, so that printed text is not taken for a verdict.
    token = os.urandom(16).hex()
    parent_pid = os.getpid()
    child_pid = os.fork()
    if child_pid == 0:
        os.close(report_fd)
        os.close(read_fd)
        _be_tested(code, test, timeout_s, token, write_fd, parent_pid)
    os.close(write_fd)
    try:
        return _read_verdict(read_fd, token, timeout_s)
    finally:
        os.close(read_fd)
        _end_children()


def _be_tested(
    code: str, test: Any, timeout_s: float, token: str, write_fd: int, parent_pid: int
) -> NoReturn:
    """In the child: run both, tell, and end without looking back."""
    error: str | None = "ended by itself"
    try:
        end_with_parent(parent_pid)
        max_cpu_s = math.ceil(timeout_s) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        if hard != resource.RLIM_INFINITY:  # a limit of the server's own
            max_cpu_s = min(max_cpu_s, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s))
        namespace: dict[str, Any] = {"__name__": "solution"}
        exec(compile(code, "<completion>", "exec", dont_inherit=True), namespace)
        exec(test, namespace)
        error = None
    # Whatever the code raises, SystemExit included, fails its test.
    except BaseException as exc:  # noqa: BLE001
        error = type(exc).__name__
        error = f"{error}: {exc}"[:MAX_ERROR_CHARS]  # raises if the text is code that does
    finally:
        try:
            verdict = json.dumps({"token": token, "error": error})
            os.write(write_fd, f"\n{verdict}\n".encode())
        finally:
            os._exit(0)


def _read_verdict(read_fd: int, token: str, timeout_s: float) -> str | None:
    """What the child says within its time. Whatever else comes through the pipe does not count."""
    end_s = time.monotonic() + timeout_s
    received = b""
    while len(received) < MAX_VERDICT_BYTES:
        left_s = end_s - time.monotonic()
        if left_s <= 0 or not select.select([read_fd], [], [], left_s)[0]:
            return f"no result within {timeout_s:g} s"
        part = os.read(read_fd, 4096)
        if not part:
            return "the process ended before the test did"
        received += part
        for line in received.split(b"\n"):
            with contextlib.suppress(ValueError):
                verdict = json.loads(line)
                if isinstance(verdict, dict) and verdict.get("token") == token:
                    return verdict["error"]  # type: ignore[no-any-return]  # ours, by its token
    return "the process wrote into the verdict's pipe"


def _end_children() -> None:
    """Kill and reap children, and the orphans that become ours by it, until none is left."""
    while True:
        for pid in _child_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _child_pids() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


if __name__ == "__main__":
    main()
