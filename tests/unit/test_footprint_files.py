"""Which files in shared memory count as an engine's."""

from __future__ import annotations

import mmap
import os
import uuid
from pathlib import Path

import pytest

from rollout_server.engine.footprint import SHARED_MEMORY, own_footprint


@pytest.mark.parametrize(
    ("prefix", "is_ours"),
    [("psm_", True), ("vllm_dist_", True), ("somebody_", False)],
)
def test_what_an_engine_maps_is_of_its_footprint(prefix: str, is_ours: bool) -> None:
    path = Path(SHARED_MEMORY) / f"{prefix}{uuid.uuid4().hex}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE):
            assert (str(path) in own_footprint().shared_memory_files) is is_ours
        assert str(path) not in own_footprint().shared_memory_files, "nobody maps it any more"
    finally:
        os.close(descriptor)
        path.unlink()
