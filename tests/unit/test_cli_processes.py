"""Child processes end for certain, with everything they started."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from shared.cli import processes
from shared.cli.processes import ChildProcess, child_environment, file_tail

IGNORES_SIGTERM = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
child = subprocess.Popen(sleeper, start_new_session=True)
print(child.pid, flush=True)
time.sleep(300)
"""
TIDY = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(300)
"""


@pytest.fixture
def module_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose modules children can start."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def start(module_dir: Path, name: str, source: str) -> ChildProcess:
    """Start a module and wait for its first line of output."""
    (module_dir / f"{name}.py").write_text(source, encoding="utf-8")
    child = ChildProcess(name, name, [], module_dir / f"{name}.log")
    while not child.log_tail():  # bounded by the test's timeout
        assert child.poll() is None
        time.sleep(0.02)
    return child


def test_a_child_that_ends_on_sigterm_keeps_its_exit_code(module_dir: Path) -> None:
    child = start(module_dir, "tidy", TIDY)
    assert child.stop(30.0) == 7


def test_a_child_that_ignores_sigterm_is_killed_with_its_detached_children(
    module_dir: Path,
) -> None:
    child = start(module_dir, "stubborn", IGNORES_SIGTERM)
    grandchild = psutil.Process(int(child.log_tail()))
    try:
        assert child.stop(0.2) == -9
        assert not grandchild.is_running()
    finally:
        if grandchild.is_running():
            grandchild.kill()


def test_stopping_twice_is_harmless(module_dir: Path) -> None:
    child = start(module_dir, "tidy", TIDY)
    assert child.stop(30.0) == child.stop(30.0)


def test_children_die_with_a_killed_parent(module_dir: Path) -> None:
    (module_dir / "tidy.py").write_text(TIDY, encoding="utf-8")
    parent = start(
        module_dir,
        "parent",
        "import time\nfrom pathlib import Path\n"
        "from shared.cli.processes import ChildProcess\n"
        "print(ChildProcess('tidy', 'tidy', [], Path('/dev/null')).pid, flush=True)\n"
        "time.sleep(300)\n",
    )
    orphan = psutil.Process(int(parent.log_tail()))
    psutil.Process(parent.pid).kill()
    try:
        orphan.wait(timeout=30)
    finally:
        parent.stop(1.0)


def test_resolved_settings_do_not_reach_children_through_the_environment() -> None:
    kept = child_environment({"SLIPSTREAM_ENGINE__COUNT": "2", "SLIPSTREAM_URL": "u", "HOME": "h"})
    assert set(kept) == {"SLIPSTREAM_URL", "HOME", "PYTHONUNBUFFERED"}


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("\n".join(f"line {i}" for i in range(1000)), encoding="utf-8")
    assert file_tail(path, 2) == "line 998\nline 999"
    assert file_tail(tmp_path / "absent", 2) == ""


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3), (1, 1)])
def test_the_exit_code_of_an_attached_module_is_passed_on(
    module_dir: Path, code: int, expected: int
) -> None:
    (module_dir / "leaves.py").write_text(f"raise SystemExit({code})", encoding="utf-8")
    assert processes.run_module("leaves", []) == expected


def test_a_process_that_is_gone_has_no_descendants() -> None:
    pid = os.spawnl(os.P_NOWAIT, sys.executable, sys.executable, "-c", "")
    os.waitpid(pid, 0)
    assert processes.process_descendants(pid) == set()
