"""What a killed server's engines have left is removed by the next start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rollout_server.engine.footprint import Footprint, merged
from rollout_server.engine.footprint_store import FootprintStore


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.footprint.EXIT_TIMEOUT_S", 0.2)


def test_processes_and_files_of_a_dead_server_are_removed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    queue = tmp_path / "psm_0123"
    queue.touch()
    started = psutil.Process(child.pid).create_time()
    footprint = Footprint(processes=((child.pid, started),), shared_memory_files=(str(queue),))
    FootprintStore(tmp_path / "engines").remember("engine-0", footprint)
    assert FootprintStore(tmp_path / "engines").clean_up() == 1
    assert child.wait(timeout=5) < 0
    assert not queue.exists()
    assert FootprintStore(tmp_path / "engines").clean_up() == 0


def test_what_was_stopped_well_is_forgotten(tmp_path: Path) -> None:
    store = FootprintStore(tmp_path / "engines")
    store.remember("engine-0", Footprint(processes=((1, 1.0),), shared_memory_files=()))
    store.forget("engine-0")
    store.forget("engine-1")
    assert store.clean_up() == 0


@pytest.mark.parametrize("text", ["", "[]", '{"processes": [[1]]}', '{"processes": 3}'])
def test_a_damaged_record_is_dropped(tmp_path: Path, text: str) -> None:
    (tmp_path / "engine-0.json").write_text(text)
    FootprintStore(tmp_path).clean_up()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "engines").touch()
    store = FootprintStore(tmp_path / "engines")
    store.remember("engine-0", Footprint(processes=(), shared_memory_files=()))
    store.forget("engine-0")
    assert store.clean_up() == 0


def test_a_child_that_was_killed_meanwhile_still_belongs_to_the_footprint() -> None:
    earlier = Footprint(processes=((2, 1.0), (3, 1.0), (1, 1.0)), shared_memory_files=("a", "b"))
    later = Footprint(processes=((4, 2.0), (1, 1.0)), shared_memory_files=("b", "c"))
    both = merged(earlier, later)
    assert both.processes == ((2, 1.0), (3, 1.0), (4, 2.0), (1, 1.0))
    assert both.shared_memory_files == ("a", "b", "c")
    assert merged(None, later) == later
