"""An engine's own temporary directory: who uses it, and that nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.engine.scratch import (
    MAX_SOCKET_PATH,
    NAME_PREFIX,
    SOCKET_NAME_LENGTH,
    ScratchDirectory,
    sweep_dead_scratch,
)
from shared.process_identity import boot_id, pid_namespace, process_start_ticks

WHERE = "import tempfile; print(tempfile.gettempdir())"


@pytest.fixture
def parent() -> Iterator[Path]:
    """As short a path as sockets in it need."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as directory:
        yield Path(directory)


def directories(parent: Path) -> list[Path]:
    return sorted(parent.glob(f"{NAME_PREFIX}*"))


def test_processes_started_meanwhile_use_it_and_this_one_does_not(parent: Path) -> None:
    before = dict(os.environ)
    scratch = ScratchDirectory(parent)
    with scratch.of_child_processes():
        (path,) = directories(parent)
        assert os.environ["VLLM_RPC_BASE_PATH"] == str(path)
        child = subprocess.run([sys.executable, "-c", WHERE], capture_output=True, check=True)
        assert child.stdout.decode().strip() == str(path)
        assert tempfile.gettempdir() != str(path)
        assert path.stat().st_mode & 0o077 == 0, "nobody else's"
        (path / "socket").touch()
    assert {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} == {
        k: v for k, v in before.items() if k != "TORCHINDUCTOR_CACHE_DIR"
    }
    assert path.exists(), "the engine's processes have it as long as they run"
    scratch.remove()
    assert directories(parent) == []
    scratch.remove()


def test_compiled_kernels_stay_where_all_engines_find_them(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with ScratchDirectory(parent).of_child_processes():
        assert not os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(parent))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(parent / "kernels"))
    with ScratchDirectory(parent).of_child_processes():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(parent / "kernels")


def test_a_socket_in_it_has_a_path_that_linux_takes(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    scratch = ScratchDirectory(deep)
    try:
        with scratch.of_child_processes():
            path = os.environ["VLLM_RPC_BASE_PATH"]
            assert len(path) + SOCKET_NAME_LENGTH <= MAX_SOCKET_PATH
            assert directories(deep) == []
    finally:
        scratch.remove()
    assert not Path(path).exists()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def made(parent: Path, pid: int, start: int, namespace: int, boot: str | None = None) -> Path:
    path = parent / f"{NAME_PREFIX}{pid}.{start}.{namespace}.{boot or boot_id()}.a_1b"
    path.mkdir()
    (path / "socket").touch()
    return path


def test_what_a_dead_engine_had_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead, here = dead_pid(), pid_namespace()
    gone = made(tmp_path, dead, 7, here)
    lives = made(tmp_path, os.getpid(), process_start_ticks(os.getpid()) or 0, here)
    earlier_of_our_pid = made(tmp_path, os.getpid(), 1, here)
    elsewhere = made(tmp_path, dead, 7, here + 1)
    another_host = made(tmp_path, dead, 7, here, boot="0f0f0f0f")
    other = tmp_path / f"{NAME_PREFIX}notes"
    other.mkdir()
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    link = tmp_path / f"{NAME_PREFIX}{dead}.8.{here}.{boot_id()}.x"
    link.symlink_to(treasure)
    assert sweep_dead_scratch(tmp_path) == sorted([gone.name, earlier_of_our_pid.name])
    assert not gone.exists()
    assert not earlier_of_our_pid.exists()
    assert lives.exists()
    assert elsewhere.exists()
    assert another_host.exists()
    assert other.exists()
    assert treasure.exists()


def test_anothers_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, dead_pid(), 7, pid_namespace())
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert sweep_dead_scratch(tmp_path) == []
    assert path.exists()
