"""Segments that arrive in buckets: every byte once and in order, from one trainer at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_server.weights.transports.incoming import IncomingFile
from rollout_server.weights.transports.node_copies import NodeCopies
from rollout_server.weights.transports.receiver import SegmentReceiver
from shared.errors import WeightTransferError, WeightVerificationError
from shared.weights import SegmentKind, build_manifest, segment_name, write_safetensors

DATA = np.arange(100, dtype=np.uint8)


class StillClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


def receiver(directory: Path) -> tuple[SegmentReceiver, StillClock]:
    clock: Any = StillClock()
    return SegmentReceiver(str(directory), idle_limit_s=10, kept_limit_s=100, clock=clock), clock


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_when_all_of_it_has_come(tmp_path: Path) -> None:
    file = IncomingFile(tmp_path / "segment", 100)
    file.append(0, DATA[:60].data)
    file.append(60, DATA[60:].data)
    assert names(tmp_path) == ["segment.partial"]
    file.finish()
    assert names(tmp_path) == ["segment"]
    assert (tmp_path / "segment").read_bytes() == DATA.tobytes()
    assert (tmp_path / "segment").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("offset", "num_bytes", "message"),
    [
        (61, 30, "starts at byte 61, byte 60 is next"),
        (0, 60, "starts at byte 0, byte 60 is next"),
        (60, 41, "ends at byte 101, announced were 100"),
    ],
    ids=["gap", "repeated", "too long"],
)
def test_buckets_out_of_order_end_the_file(
    tmp_path: Path, offset: int, num_bytes: int, message: str
) -> None:
    file = IncomingFile(tmp_path / "segment", 100)
    file.append(0, DATA[:60].data)
    with pytest.raises(WeightTransferError, match=message):
        file.append(offset, DATA[:num_bytes].data)
    assert names(tmp_path) == []
    with pytest.raises(WeightTransferError, match="takes no more"):
        file.append(60, DATA[60:].data)


def test_a_short_file_never_gets_its_name(tmp_path: Path) -> None:
    file = IncomingFile(tmp_path / "segment", 100)
    file.append(0, DATA[:60].data)
    with pytest.raises(WeightTransferError, match="60 of 100 bytes have come"):
        file.finish()
    assert names(tmp_path) == []


def test_room_is_checked_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(WeightTransferError, match=r"needs 1152921504606846976 bytes.*free"):
        IncomingFile(tmp_path / "segment", 1 << 60)
    with pytest.raises(WeightTransferError, match=r"cannot be made.*shared_memory_dir"):
        IncomingFile(tmp_path / "absent" / "segment", 1)
    assert names(tmp_path) == []


def test_a_segment_is_named_after_the_receiver_and_removed_when_the_trainer_says_so(
    tmp_path: Path,
) -> None:
    inbox, _ = receiver(tmp_path)
    upload, segment = inbox.begin(3, 100)
    assert segment == segment_name(os.getpid(), 3)
    inbox.append(upload, 0, DATA)
    inbox.finish(upload)
    assert (tmp_path / segment).read_bytes() == DATA.tobytes()
    inbox.discard(upload)
    inbox.discard(upload)
    assert names(tmp_path) == []


def test_the_latest_of_two_writers_goes_on_and_the_other_is_told(tmp_path: Path) -> None:
    inbox, _ = receiver(tmp_path)
    hung, _ = inbox.begin(3, 100)
    inbox.append(hung, 0, DATA[:60])
    restarted, segment = inbox.begin(3, 100)
    with pytest.raises(WeightTransferError, match="another trainer began one"):
        inbox.append(hung, 60, DATA[60:])
    inbox.append(restarted, 0, DATA)
    with pytest.raises(WeightTransferError, match="another trainer began one"):
        inbox.finish(hung)
    inbox.finish(restarted)
    inbox.discard(hung)
    assert names(tmp_path) == [segment]


def test_a_complete_segment_that_waits_for_its_push_survives_the_next_upload(
    tmp_path: Path,
) -> None:
    inbox, _ = receiver(tmp_path)
    upload, segment = inbox.begin(3, 100)
    inbox.append(upload, 0, DATA)
    inbox.finish(upload)
    inbox.begin(4, 100)
    assert segment in names(tmp_path)


def test_what_a_dead_trainer_left_goes_half_segments_sooner(tmp_path: Path) -> None:
    inbox, clock = receiver(tmp_path)
    complete, segment = inbox.begin(3, 100)
    inbox.append(complete, 0, DATA)
    inbox.finish(complete)
    half, _ = inbox.begin(4, 100)
    clock.now_s = 9
    inbox.append(half, 0, DATA[:60])
    clock.now_s = 18
    inbox.expire()
    assert len(names(tmp_path)) == 2
    clock.now_s = 20
    inbox.expire()
    assert names(tmp_path) == [segment]
    clock.now_s = 101
    inbox.expire()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [SegmentKind.TRAINER, SegmentKind.NODE])
def test_files_of_killed_actors_are_swept_by_the_next(tmp_path: Path, kind: SegmentKind) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = segment_name(child.pid, 1, kind)
    (tmp_path / left).touch()
    (tmp_path / f"{left}.partial").touch()
    receiver(tmp_path)
    NodeCopies(str(tmp_path))
    assert len(names(tmp_path)) == 2
    child.communicate()
    NodeCopies(str(tmp_path))
    assert names(tmp_path) == []


def test_a_copy_is_verified_on_its_node(tmp_path: Path) -> None:
    original = tmp_path / "slipstream-weights-1-v1.safetensors"
    write_safetensors(original, [("a", "F32", (8,), np.ones(8, np.float32))])
    manifest = build_manifest(original)
    data = np.fromfile(original, np.uint8)
    (tmp_path / "node").mkdir()
    copies = NodeCopies(str(tmp_path / "node"))
    copies.begin(1, len(data))
    copies.append(1, 0, data)
    path = Path(copies.finish(1, manifest))
    assert path.name == segment_name(os.getpid(), 1, SegmentKind.NODE)
    assert path.read_bytes() == original.read_bytes()

    data[-1] ^= 1
    copies.begin(1, len(data))
    copies.append(1, 0, data)
    with pytest.raises(WeightVerificationError, match="tensor 'a': expected digest"):
        copies.finish(1, manifest)
    assert names(tmp_path / "node") == []
    with pytest.raises(WeightTransferError, match="version 1 was not begun"):
        copies.append(1, 0, data)
