"""What a killed server has committed outlives it, as long as its record says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.weight_claims import write_claim
from shared.weights import SegmentKind, segment_name, sweep_stale_segments


def dead_server_segment(directory: Path) -> Path:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    segment = directory / segment_name(child.pid, 4, SegmentKind.SERVER)
    child.communicate(b"\n", timeout=60)
    segment.touch()
    return segment


def test_what_a_killed_server_has_committed_is_kept_while_its_record_says_so(
    tmp_path: Path,
) -> None:
    shared_memory = tmp_path / "shm"
    shared_memory.mkdir()
    segment, record = dead_server_segment(shared_memory), tmp_path / "committed.json"
    write_claim(segment, record)
    record.write_text(json.dumps({"path": str(segment)}))
    assert sweep_stale_segments(shared_memory) == []
    assert len(list(shared_memory.iterdir())) == 2
    record.write_text(json.dumps({"path": "another"}))
    assert sweep_stale_segments(shared_memory) == [segment.name]
    assert list(shared_memory.iterdir()) == []


@pytest.mark.parametrize("record", ["", "[1]", '{"path": 3}', "\x00" * 10, None])
def test_a_claim_without_a_sound_record_keeps_nothing(tmp_path: Path, record: str | None) -> None:
    shared_memory = tmp_path / "shm"
    shared_memory.mkdir()
    segment = dead_server_segment(shared_memory)
    write_claim(segment, tmp_path / "committed.json")
    if record is not None:
        (tmp_path / "committed.json").write_text(record)
    assert sweep_stale_segments(shared_memory) == [segment.name]
    assert list(shared_memory.iterdir()) == []


def test_a_claim_without_its_segment_is_swept(tmp_path: Path) -> None:
    segment = dead_server_segment(tmp_path)
    write_claim(segment, tmp_path / "committed.json")
    segment.unlink()
    sweep_stale_segments(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(30)
def test_a_claim_cannot_make_a_sweep_wait(tmp_path: Path) -> None:
    shared_memory = tmp_path / "shm"
    shared_memory.mkdir()
    segment = dead_server_segment(shared_memory)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write_claim(segment, pipe)
    assert sweep_stale_segments(shared_memory) == [segment.name]
    segment = dead_server_segment(shared_memory)
    os.mkfifo(shared_memory / f"{segment.name}.claim")
    assert sweep_stale_segments(shared_memory) == [segment.name]
