"""Spare segments: whose memory may be written over, and that nobody reads what is."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared import segment_writer
from shared.config.weights import WeightsConfig
from shared.errors import WeightTransferError
from shared.segment_sinks import MAPPED_CHUNK_BYTES, MappedFile, has_all_memory
from shared.segment_writer import TensorSpec, write_segment
from shared.spare_segments import SPARE_PREFIX, take_spare
from shared.types import SegmentEncoding, TransportKind
from shared.weights import SegmentKind, build_manifest, segment_name, sweep_stale_segments
from trainer.outbox import FileOutbox

OLD = b"old bytes" * 1000
SIZES = [0, 1, 7, MAPPED_CHUNK_BYTES, 5 * MAPPED_CHUNK_BYTES + 3]
"""Of tensors: of a part of a chunk, of one, of several that two threads share."""


@pytest.fixture
def spare(tmp_path: Path) -> Path:
    path = tmp_path / f"{SPARE_PREFIX}1-v1.safetensors"
    path.write_bytes(OLD)
    path.chmod(0o600)
    return path


def target(spare: Path) -> Path:
    return spare.with_name("slipstream-weights-2-v2.safetensors")


def specs_of(sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(f"t{index}", "U8", (size,)) for index, size in enumerate(sizes)]


def produce_of(
    seed: int, piece_bytes: int = 1 << 30
) -> Callable[[TensorSpec], Iterator[bytearray]]:
    """A tensor's bytes, in pieces that all lie in one buffer, as a trainer's may."""

    def produce(spec: TensorSpec) -> Iterator[bytearray]:
        rng = np.random.default_rng([seed, int(spec.name[1:])])
        data = rng.bytes(spec.num_bytes or 0)
        for start in range(0, len(data), piece_bytes):
            piece = bytearray(data[start : start + piece_bytes])
            yield piece
            piece[:] = b"\xee" * len(piece)

    return produce


def test_nothing_is_taken_where_nothing_is(tmp_path: Path) -> None:
    assert take_spare(tmp_path, tmp_path / "taken") is None
    assert list(tmp_path.iterdir()) == []


def test_a_spare_is_had_once(spare: Path) -> None:
    inode = spare.stat().st_ino
    descriptor = take_spare(spare.parent, target(spare))
    assert descriptor is not None
    assert os.fstat(descriptor).st_ino == target(spare).stat().st_ino == inode
    assert not spare.exists()
    assert take_spare(spare.parent, spare.with_name("other")) is None
    os.close(descriptor)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_what_another_process_reads_is_not_written_over(spare: Path, is_mapped: bool) -> None:
    hold = "m = mmap.mmap(fd, 0, prot=mmap.PROT_READ); os.close(fd)" if is_mapped else "m = None"
    code = (
        f"import mmap, os, sys; fd = os.open({str(spare)!r}, os.O_RDONLY); {hold};"
        "print('holds', flush=True); sys.stdin.read();"
        "print((m[:] if m else os.read(fd, 1 << 20)).decode())"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"holds\n"
        write_segment(target(spare), specs_of([9000]), produce_of(1), takes_spare=True)
        read, _ = reader.communicate(timeout=30)
    assert read.strip() == OLD
    assert sorted(path.name for path in spare.parent.iterdir()) == [target(spare).name]


def test_what_this_process_maps_is_not_written_over(spare: Path) -> None:
    with spare.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert take_spare(spare.parent, target(spare)) is None
    assert mapped[:] == OLD
    assert list(spare.parent.iterdir()) == []


def test_a_file_with_another_name_is_not_written_over(spare: Path) -> None:
    other = spare.with_name("slipstream-server-1-v1.safetensors")
    other.hardlink_to(spare)
    assert take_spare(spare.parent, target(spare)) is None
    assert list(spare.parent.iterdir()) == [other]
    assert other.read_bytes() == OLD


def test_a_link_to_somewhere_is_not_followed(spare: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "precious"
    spare.rename(elsewhere)
    spare.symlink_to(elsewhere)
    assert take_spare(spare.parent, target(spare)) is None
    assert elsewhere.read_bytes() == OLD


def test_what_others_may_open_is_not_taken(spare: Path) -> None:
    spare.chmod(0o644)
    assert take_spare(spare.parent, target(spare)) is None


@pytest.mark.parametrize("piece_bytes", [1 << 30, MAPPED_CHUNK_BYTES + 1], ids=["whole", "pieces"])
@pytest.mark.parametrize("old_sizes", [SIZES, [1], [*SIZES, 99_999]], ids=["as", "less", "more"])
def test_a_segment_in_a_spare_is_what_it_is_in_a_file_of_its_own(
    tmp_path: Path, old_sizes: list[int], piece_bytes: int
) -> None:
    spare = tmp_path / segment_name(1, 1, SegmentKind.SPARE)
    write_segment(spare, specs_of(old_sizes), produce_of(1))
    inode = spare.stat().st_ino
    path = tmp_path / "slipstream-weights-2-v2.safetensors"
    manifest = write_segment(path, specs_of(SIZES), produce_of(2, piece_bytes), takes_spare=True)
    assert path.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [path]
    fresh = tmp_path / "fresh" / path.name
    fresh.parent.mkdir()
    assert write_segment(fresh, specs_of(SIZES), produce_of(2)) == manifest
    assert path.read_bytes() == fresh.read_bytes()
    assert build_manifest(path) == manifest
    assert manifest.encoding is SegmentEncoding.FULL


@pytest.mark.parametrize("off_by", [-1, 1, 10 * MAPPED_CHUNK_BYTES])
def test_a_tensor_that_does_not_fit_is_refused_and_nothing_stays(
    tmp_path: Path, off_by: int
) -> None:
    write_segment(tmp_path / segment_name(1, 1, SegmentKind.SPARE), specs_of(SIZES), produce_of(1))
    path = tmp_path / "slipstream-weights-2-v2.safetensors"
    made = specs_of([*SIZES[:-1], SIZES[-1] + off_by])
    with pytest.raises(WeightTransferError, match="needs"):
        write_segment(
            path,
            specs_of(SIZES),
            lambda spec: produce_of(2)(made[int(spec.name[1:])]),
            takes_spare=True,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_spare_needs_room_only_for_what_it_is_short_of(
    spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        segment_writer, "check_free_space", lambda _, needed_bytes: asked.append(needed_bytes)
    )
    has_bytes = spare.stat().st_blocks * 512
    write_segment(target(spare), specs_of([1 << 20]), produce_of(1), takes_spare=True)
    assert asked == [target(spare).stat().st_size - has_bytes]
    target(spare).rename(spare)
    write_segment(target(spare), specs_of([1 << 20]), produce_of(2), takes_spare=True)
    assert asked[1:] == [0]


class InterruptedDigest:
    """As by Ctrl-C in the middle of a piece."""

    def update(self, chunk: memoryview) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_write_ends_as_interrupted(tmp_path: Path) -> None:
    data = memoryview(bytes(3 * MAPPED_CHUNK_BYTES))
    with (tmp_path / "file").open("wb+") as file:
        file.write(data)
        file.flush()
        with (
            pytest.raises(KeyboardInterrupt),
            MappedFile(file.fileno(), len(data)) as sink,
        ):
            sink.write(data, InterruptedDigest())


def test_a_file_with_holes_is_not_mapped(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 20)
        assert not has_all_memory(file.fileno(), 1 << 20)
        file.write(b"x" * (1 << 20))
        file.flush()
        os.fsync(file.fileno())
        assert has_all_memory(file.fileno(), 1 << 20)


@pytest.mark.parametrize(
    ("transport", "is_taken"),
    [(TransportKind.SHARED_MEMORY, True), (TransportKind.FILESYSTEM, False)],
)
def test_a_trainer_takes_spares_in_shared_memory(
    spare: Path, transport: TransportKind, is_taken: bool
) -> None:
    inode = spare.stat().st_ino
    directory = str(spare.parent)
    config = WeightsConfig(
        transport=transport, shared_memory_dir=directory, filesystem_dir=directory
    )
    outbox = FileOutbox(config)
    written = outbox.write(2, specs_of([9000]), produce_of(1))
    path = spare.parent / written.manifest.segment
    assert (path.stat().st_ino == inode) is is_taken
    assert spare.exists() is not is_taken
    assert build_manifest(path) == written.manifest
    outbox.discard()
    assert not path.exists()


def test_the_spare_of_a_dead_server_is_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        dead = segment_name(ended.pid, 1, SegmentKind.SPARE)
    living = segment_name(os.getpid(), 1, SegmentKind.SPARE)
    for name in (dead, living):
        (tmp_path / name).touch()
    assert sweep_stale_segments(tmp_path) == [dead]
    assert [path.name for path in tmp_path.iterdir()] == [living]
