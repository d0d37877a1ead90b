"""What dead engines have left in shared memory goes; what lives, or is not ours, stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rollout_server.engine.footprint_record import (
    NAME_PREFIX,
    FootprintRecord,
    remove_own_traces,
    sweep_dead_engines,
)
from shared.process_identity import pid_namespace, process_start_ticks

ENGINE = """
import mmap, os, subprocess, sys
from pathlib import Path
from rollout_server.engine.footprint_record import FootprintRecord

directory = Path(sys.argv[1])
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
queue = directory / f"psm_test{os.getpid()}"
queue.write_bytes(bytes(64))
with queue.open("r+b") as file:
    mapped = mmap.mmap(file.fileno(), 64)
for pid in (os.getpid(), worker.pid):
    (directory / f"__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").touch()
FootprintRecord(directory).write()
print(worker.pid, flush=True)
sys.stdin.read()
"""
"""Stands for an engine: a process, one below it, a queue that is mapped, OpenMP's files."""


@dataclass(frozen=True)
class Engine:
    process: subprocess.Popen[str]
    worker_pid: int
    directory: Path

    def files(self) -> set[str]:
        """Its own, among all that lie there."""
        pid, uid = self.process.pid, os.getuid()
        own = {f"psm_test{pid}"}
        own |= {f"__KMP_REGISTERED_LIB_{one}_{uid}" for one in (pid, self.worker_pid)}
        return {
            path.name
            for path in self.directory.iterdir()
            if path.name in own or path.name.startswith(f"{NAME_PREFIX}{pid}.")
        }

    def kill(self, *, with_worker: bool = True) -> None:
        self.process.kill()
        self.process.wait(10)
        if with_worker:
            kill_orphan(self.worker_pid)


def kill_orphan(pid: int) -> None:
    """Nobody's child any more: whoever collects it may take seconds, dead it is at once."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        worker = psutil.Process(pid)
        os.kill(pid, signal.SIGKILL)
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)  # bounded by the test's timeout


@pytest.fixture
def engine() -> Iterator[Engine]:
    """In the real shared memory: queues are found by what a process maps there."""
    directory = Path("/dev/shm")
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    engine = Engine(process, int(process.stdout.readline()), directory)
    try:
        yield engine
    finally:
        engine.kill()
        for name in engine.files():
            (directory / name).unlink()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.footprint_record.EXIT_TIMEOUT_S", 0.2)


def test_what_a_killed_engine_left_is_removed_and_nothing_before_it_is_dead(
    engine: Engine,
) -> None:
    everything = engine.files()
    assert len(everything) == 4, everything
    sweep_dead_engines()
    assert engine.files() == everything
    engine.kill()
    removed = sweep_dead_engines()
    assert set(removed) >= {name for name in everything if not name.startswith(NAME_PREFIX)}
    assert engine.files() == set()


def test_as_long_as_a_worker_lives_its_engines_files_stay(engine: Engine) -> None:
    everything = engine.files()
    engine.kill(with_worker=False)
    sweep_dead_engines()
    assert engine.files() == everything
    kill_orphan(engine.worker_pid)
    sweep_dead_engines()
    assert engine.files() == set()


def record(directory: Path, *, namespace: int | None = None, **fields: object) -> Path:
    """Of an engine that is long gone."""
    owner = f"{dead_pid()}.1.{pid_namespace() if namespace is None else namespace}"
    path = directory / f"{NAME_PREFIX}{owner}.json"
    path.write_text(json.dumps({"processes": [], "files": [], **fields}))
    return path


def dead_pid() -> int:
    """Of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def test_a_record_of_another_container_is_left_to_it(tmp_path: Path) -> None:
    queue = tmp_path / "psm_1"
    queue.touch()
    theirs = record(tmp_path, namespace=1, files=["psm_1"])
    assert sweep_dead_engines(tmp_path) == []
    assert queue.exists()
    assert theirs.exists()


def test_another_users_records_are_not_obeyed_and_their_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = tmp_path / "psm_1"
    queue.touch()
    theirs = record(tmp_path, files=["psm_1"])
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep_dead_engines(tmp_path) == []
    assert theirs.exists()
    monkeypatch.undo()
    ours = theirs.rename(tmp_path / "elsewhere")
    (tmp_path / f"{NAME_PREFIX}{dead_pid()}.1.{pid_namespace()}.json").symlink_to(ours)
    assert sweep_dead_engines(tmp_path) == []
    assert queue.exists()


def test_a_record_can_only_have_an_engines_kinds_of_files_removed(tmp_path: Path) -> None:
    directory = tmp_path / "shm"
    directory.mkdir()
    (directory / "psm_").mkdir()
    outside, other, queue = (
        tmp_path / "victim",
        directory / "slipstream-server-1",
        directory / "psm_1",
    )
    for path in (outside, other, queue):
        path.touch()
    record(
        directory,
        files=["../victim", str(outside), "psm_/../../victim", "slipstream-server-1", "psm_1"],
    )
    assert sweep_dead_engines(directory) == ["psm_1"]
    assert outside.exists()
    assert other.exists()


def test_a_pid_that_is_used_again_is_not_taken_for_the_dead_one(tmp_path: Path) -> None:
    own = os.getpid()
    start = process_start_ticks(own)
    assert start is not None
    registration = tmp_path / f"__KMP_REGISTERED_LIB_{own}_{os.getuid()}"
    registration.touch()
    queue = tmp_path / "psm_1"
    queue.touch()
    record(tmp_path, processes=[[own, start - 1]], files=["psm_1"])
    assert sweep_dead_engines(tmp_path) == ["psm_1"]
    assert registration.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"processes": [[1]]}', '{"processes": [], "fi'])
def test_a_damaged_record_of_a_dead_engine_is_dropped(tmp_path: Path, text: str) -> None:
    path = record(tmp_path)
    path.write_text(text)
    path.with_name(path.name + ".partial").touch()
    sweep_dead_engines(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_kept_up_while_children_come_and_keeps_those_that_go(tmp_path: Path) -> None:
    record = FootprintRecord(tmp_path)
    with record.kept_up(interval_s=0.01):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            while child.pid not in recorded_pids(tmp_path):
                time.sleep(0.01)  # bounded by the test's timeout
        finally:
            child.kill()
            child.wait(10)
    assert child.pid in recorded_pids(tmp_path)
    record.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_shutdown_that_had_to_kill_leaves_nothing_of_the_killed(tmp_path: Path) -> None:
    record = FootprintRecord(tmp_path)
    children = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)
    ]
    try:
        for child in children:
            (tmp_path / f"__KMP_REGISTERED_LIB_{child.pid}_{os.getuid()}").touch()
        record.write()
        children[0].kill()
        children[0].wait(10)
        record.remove()
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(f"__KMP_REGISTERED_LIB_{children[1].pid}_")
    finally:
        for child in children:
            child.kill()
            child.wait(10)


def test_a_process_with_an_openmp_file_of_its_own_stays_on_record(tmp_path: Path) -> None:
    (tmp_path / f"__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").touch()
    record = FootprintRecord(tmp_path)
    record.write()
    record.remove()
    assert os.getpid() in recorded_pids(tmp_path)


def test_an_actor_that_is_killed_next_leaves_neither_record_nor_registration(
    tmp_path: Path,
) -> None:
    (tmp_path / f"__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").touch()
    FootprintRecord(tmp_path).write()
    remove_own_traces(None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    record = FootprintRecord(tmp_path / "missing")
    record.write()
    record.remove()


def recorded_pids(directory: Path) -> set[int]:
    (path,) = directory.glob(f"{NAME_PREFIX}*.json")
    return {pid for pid, _ in json.loads(path.read_text())["processes"]}
