"""What becomes of a superseded version's memory: the next version is written into it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from shared.errors import SlipstreamError
from shared.safetensors_file import open_regular_file
from shared.schemas.weights import PublishRequest
from shared.segment_writer import TensorSpec, write_segment
from shared.types import TransportKind
from shared.weights import SegmentKind, segment_name
from tests.fakes.weight_push import PushWorld, StartWorld, worlds
from tests.integration.test_coordinator_delta import delta_request, push_delta


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


def server_file(it: PushWorld, version: int) -> Path:
    return it.directory / segment_name(os.getpid(), version, SegmentKind.SERVER)


async def push_into_spare(it: PushWorld, version: int, base: int, value: float) -> None:
    """As trainers do."""
    data = {"a": np.float32([value]).tobytes(), "b": np.float32([-value]).tobytes()}
    path = it.directory / segment_name(os.getpid(), version)
    specs = [TensorSpec(name, "F32", (1,)) for name in data]
    manifest = write_segment(path, specs, lambda spec: [data[spec.name]], takes_spare=True)
    request = PublishRequest(version=version, base_version=base, manifest=manifest)
    await it.coordinator.publish(request)
    path.unlink()


async def test_versions_take_turns_in_the_memory_of_two(start: StartWorld) -> None:
    it = start()
    inodes = []
    for version in range(1, 6):
        await push_into_spare(it, version, version - 1, float(version))
        assert it.first.loaded == [version, -version]
        inodes.append(server_file(it, version).stat().st_ino)
        assert it.files() == it.server_files(version, spare=version - 1 or None)
    assert inodes[2:] == inodes[:3]
    assert len(set(inodes)) == 2


async def test_of_trainers_that_take_no_spare_one_is_left_at_most(start: StartWorld) -> None:
    it = start()
    for version in range(1, 4):
        await it.push(version, version - 1)
    assert it.files() == it.server_files(3, spare=2)


async def test_a_version_that_somebody_still_reads_stays_what_it_was(start: StartWorld) -> None:
    it = start()
    await push_into_spare(it, 1, 0, 1.0)
    before = server_file(it, 1).read_bytes()
    reader = open_regular_file(server_file(it, 1))
    try:
        await push_into_spare(it, 2, 1, 2.0)
        await push_into_spare(it, 3, 2, 3.0)
        assert os.pread(reader, 1 << 20, 0) == before
    finally:
        os.close(reader)
    assert it.first.loaded == [3.0, -3.0]


async def test_what_a_delta_leads_to_is_written_into_a_spare(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (1.0, 2.0))
    inode = server_file(it, 1).stat().st_ino
    await it.push(2, 1, (3.0, 4.0))
    await push_delta(it, delta_request(it, 3, 2, (3.0, 5.0)))
    assert server_file(it, 3).stat().st_ino == inode
    assert it.first.loaded == [3.0, 5.0]
    assert it.files() == it.server_files(3, spare=2)


@pytest.mark.parametrize(
    "settings",
    [{"keep_spare": False}, {"transport": TransportKind.FILESYSTEM, "filesystem_dir": True}],
    ids=["not wanted", "a disk"],
)
async def test_no_spare_is_kept_where_none_is_wanted(
    start: StartWorld, settings: dict[str, object], tmp_path: Path
) -> None:
    if "filesystem_dir" in settings:
        settings = settings | {"filesystem_dir": str(tmp_path / "shm")}
    it = start(**settings)
    await it.push(1, 0)
    await it.push(2, 1)
    assert it.files() == it.server_files(2)


async def test_a_refused_push_leaves_no_spare_behind_and_a_stop_none_at_all(
    start: StartWorld,
) -> None:
    it = start()
    await it.push(1, 0)
    await it.push(2, 1)
    it.first.stage_error = it.second.stage_error = RuntimeError("does not fit")
    with pytest.raises(SlipstreamError, match="does not fit"):
        await push_into_spare(it, 3, 2, 3.0)
    (it.directory / segment_name(os.getpid(), 3)).unlink()  # the trainer's own, as it would
    assert it.files() == it.server_files(2)
    it.first.stage_error = it.second.stage_error = None
    await it.push(4, 2)
    assert it.files() == it.server_files(4, spare=2)
    await it.coordinator.close()
    assert it.files() == []
