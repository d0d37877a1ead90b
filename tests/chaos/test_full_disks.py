"""Shared memory or a disk that is full, or may not be written: the version before goes on.

On real file systems of a megabyte, mounted for the test; skipped where that is not permitted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.delta_writer import write_delta
from shared.errors import WeightTransferError
from shared.schemas.weights import PublishRequest
from shared.segment_writer import TensorSpec, write_segment
from shared.weights import SegmentKind, build_manifest, segment_name, write_safetensors
from tests.fakes.weight_push import PushWorld

KIB = 1 << 10
SMALL = 100 * KIB // 4
LARGE = 600 * KIB // 4
"""Elements of float32: one such version has room in a megabyte, two have not."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "slipstream-test", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture
async def world(disk: Path, tmp_path: Path) -> AsyncIterator[PushWorld]:
    it = PushWorld(disk, tmp_path / "state")
    yield it
    await it.coordinator.close()


def write(directory: Path, version: int, num_elements: int) -> PublishRequest:
    path = directory / segment_name(os.getpid(), version)
    values = np.full(num_elements, float(version), np.float32)
    write_safetensors(path, [("w", "F32", values.shape, values)])
    return PublishRequest(version=version, base_version=version - 1, manifest=build_manifest(path))


def fill(directory: Path) -> Path:
    """Take all the room there is; the file that does."""
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4 * KIB)):
            pass
    return filler


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_trainer_finds_too_little_room_before_it_writes(disk: Path) -> None:
    with pytest.raises(WeightTransferError, match=r"needs 2097.* bytes, .* has 1048576 free"):
        write(disk, 1, (2 << 20) // 4)
    assert names(disk) == []


def test_room_that_others_take_meanwhile_leaves_nothing_of_the_segment(disk: Path) -> None:
    spec = TensorSpec("w", "F32", (LARGE,))

    def produce(_: TensorSpec) -> Iterator[bytes]:
        (disk / "other").write_bytes(bytes(700 * KIB))
        yield bytes(LARGE * 4)

    with pytest.raises(WeightTransferError, match="No space left on device"):
        write_segment(disk / segment_name(os.getpid(), 1), [spec], produce)
    assert names(disk) == ["other"]


async def test_no_room_for_the_result_of_a_delta(world: PushWorld, disk: Path) -> None:
    request = write(disk, 1, LARGE)
    await world.coordinator.publish(request)
    (disk / request.manifest.segment).unlink()
    before = names(disk)
    values = np.full(LARGE, 1.0, np.float32)
    values[7] = 2.0
    manifest = write_delta(
        disk / segment_name(os.getpid(), 2),
        [TensorSpec("w", "F32", values.shape)],
        lambda _: [values],
        base_path=disk / segment_name(os.getpid(), 1, SegmentKind.SERVER),
        limit_bytes=1000,
    )
    with pytest.raises(WeightTransferError, match=r"has \d+ free"):
        await world.coordinator.publish(
            PublishRequest(version=2, base_version=1, manifest=manifest)
        )
    assert world.versions() == [1, 1]
    (disk / manifest.segment).unlink()
    assert names(disk) == before


async def test_a_directory_that_may_only_be_read_refuses_a_push(
    world: PushWorld, disk: Path
) -> None:
    first = write(disk, 1, SMALL)
    await world.coordinator.publish(first)
    second = write(disk, 2, SMALL)
    before = names(disk)
    with read_only(disk):
        with pytest.raises(WeightTransferError, match="Read-only file system"):
            write(disk, 3, SMALL)
        with pytest.raises(WeightTransferError, match="Read-only file system"):
            await world.coordinator.publish(second)
        assert world.versions() == [1, 1]
        assert names(disk) == before
    await world.coordinator.publish(second)
    assert world.versions() == [2, 2]


async def test_a_commit_that_cannot_be_recorded_is_taken_back_everywhere(
    disk: Path, tmp_path: Path
) -> None:
    shared_memory = tmp_path / "shm"
    shared_memory.mkdir()
    it = PushWorld(shared_memory, disk)
    try:
        await it.push(1, 0, (1.0, 2.0))
        filler = fill(disk)
        with pytest.raises(WeightTransferError, match=r"cannot be recorded .* went back"):
            await it.push(2, 1, (3.0, 4.0))
        assert it.versions() == [1, 1]
        assert it.first.loaded == [1.0, 2.0]
        filler.unlink()
        await it.push(2, 1, (3.0, 4.0))
        assert it.versions() == [2, 2]
    finally:
        await it.coordinator.close()
