"""Pushes of what changed: the same as pushes of everything, in every other respect."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from shared.delta_writer import write_delta
from shared.errors import (
    ConflictError,
    InvalidRequestError,
    WeightTransferError,
    WeightVerificationError,
)
from shared.schemas.weights import PublishRequest, PublishResponse
from shared.segment_writer import TensorSpec
from shared.types import PushPhase, SegmentEncoding
from shared.weights import SegmentKind, segment_name
from tests.fakes.weight_push import PushWorld, StartWorld, worlds


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartWorld]:
    async with worlds(tmp_path) as make:
        yield make


def delta_request(
    it: PushWorld, version: int, base: int, values: tuple[float, float]
) -> PublishRequest:
    """What a trainer would send that knows the server's file of version ``base``."""
    data = {"a": np.float32([values[0]]).tobytes(), "b": np.float32([values[1]]).tobytes()}
    manifest = write_delta(
        it.directory / segment_name(os.getpid(), version),
        [TensorSpec(name, "F32", (1,)) for name in data],
        lambda spec: [data[spec.name]],
        base_path=it.directory / segment_name(os.getpid(), base, SegmentKind.SERVER),
        limit_bytes=1000,
    )
    return PublishRequest(version=version, base_version=base, manifest=manifest)


async def push_delta(it: PushWorld, request: PublishRequest) -> PublishResponse:
    try:
        return await it.coordinator.publish(request)
    finally:
        (it.directory / request.manifest.segment).unlink(missing_ok=True)


async def test_a_delta_is_served_as_a_full_push_would_be(start: StartWorld) -> None:
    it = start()
    first = await it.push(1, 0, (3.0, 4.0))
    assert first.segment == it.server_files(1)[0]
    response = await push_delta(it, delta_request(it, 2, 1, (3.0, 5.0)))
    assert it.first.loaded == it.second.loaded == [3.0, 5.0]
    assert (response.version, response.num_bytes) == (2, 8)
    assert response.segment == it.coordinator.status().committed_segment == it.server_files(2)[0]
    assert it.files() == it.server_files(2, spare=1)
    snapshot = it.coordinator.snapshot()
    assert snapshot is not None
    assert snapshot.manifest.encoding is SegmentEncoding.FULL
    # The next one builds on the file that the server made.
    await push_delta(it, delta_request(it, 3, 2, (7.0, 5.0)))
    assert it.first.loaded == [7.0, 5.0]
    assert it.files() == it.server_files(3, spare=2)


async def test_the_same_version_is_the_same_however_it_is_sent(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    await push_delta(it, delta_request(it, 2, 1, (3.0, 5.0)))
    again = await it.push(2, 1, (3.0, 5.0))
    assert again.version == 2
    assert it.first.loads == [1, 2]
    with pytest.raises(ConflictError, match="with other tensors"):
        await it.push(2, 1, (3.0, 6.0))


async def test_the_model_directory_is_no_base_of_a_delta(start: StartWorld) -> None:
    it = start(keep_on_stop=False)
    await it.push(1, 0)
    request = delta_request(it, 2, 1, (3.0, 5.0))
    request = request.model_copy(update={"version": 1, "base_version": 0})
    await it.coordinator.close()
    other = start()
    with pytest.raises(InvalidRequestError, match="push every tensor"):
        await push_delta(other, request)
    status = other.coordinator.status()
    assert (status.committed_version, status.committed_segment) == (0, None)
    assert status.push is not None
    assert status.push.phase is PushPhase.REFUSED


async def test_a_damaged_delta_leaves_the_version_before(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    request = delta_request(it, 2, 1, (3.0, 5.0))
    path = it.directory / request.manifest.segment
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WeightVerificationError, match="tensor 'b'"):
        await push_delta(it, request)
    assert it.versions() == [1, 1]
    assert it.files() == it.server_files(1)
    await push_delta(it, delta_request(it, 2, 1, (3.0, 5.0)))
    assert it.versions() == [2, 2]


async def test_a_delta_that_an_engine_cannot_load_is_rolled_back(start: StartWorld) -> None:
    it = start(commit_policy="all")
    await it.push(1, 0, (3.0, 4.0))
    it.second.commit_error = WeightTransferError("no memory")
    with pytest.raises(WeightTransferError, match="e0 went back to version 1"):
        await push_delta(it, delta_request(it, 2, 1, (3.0, 5.0)))
    assert it.first.loaded == [3.0, 4.0]
    assert it.files() == it.server_files(1)


async def test_a_late_joiner_gets_what_deltas_led_to(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    await push_delta(it, delta_request(it, 2, 1, (3.0, 5.0)))
    late = type(it.first)("late")
    await it.join(late)
    assert (late.committed_version, late.loaded) == (2, [3.0, 5.0])


async def test_a_restarted_server_goes_on_with_what_deltas_led_to(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    await push_delta(it, delta_request(it, 2, 1, (3.0, 5.0)))
    await it.coordinator.close()
    again = start()
    assert again.coordinator.committed_version == 2
    late = type(again.first)("late")
    await again.join(late)
    assert late.loaded == [3.0, 5.0]
    # Its file lies in the state directory now: a trainer cannot read it as a base.
    assert again.coordinator.status().committed_segment is None


async def test_a_cancelled_push_leaves_no_file_of_its_delta(start: StartWorld) -> None:
    it = start()
    await it.push(1, 0, (3.0, 4.0))
    it.first.stage_gate.clear()
    request = delta_request(it, 2, 1, (3.0, 5.0))
    pushing = asyncio.create_task(it.coordinator.publish(request))
    await it.first.staging.wait()
    await it.coordinator.close()
    with pytest.raises(Exception, match="shutting down"):
        await pushing
    (it.directory / request.manifest.segment).unlink()
    assert it.files() == [], "what was committed lies in the state directory"
