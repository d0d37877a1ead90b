"""Weights over a real Ray cluster of two nodes: the bytes, the memory they take, and what is killed
on the way."""

from __future__ import annotations

import asyncio
import filecmp
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from benchmarks.harness.ray_nodes import PeakMemory, TwoNodes, two_nodes
from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.transports.ray_transport import RayNodes, start_snapshot_files
from rollout_server.weights.transports.spread import Bytes, NodeOutcome, Spread
from rollout_server.weights.verify import verify_segment
from shared.config.weights import WeightsConfig
from shared.errors import ConfigurationError, SlipstreamError, WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorSpec, write_segment
from shared.types import TransportKind
from shared.weights import SegmentKind, segment_name
from trainer.ray_transport import RayOutbox

pytestmark = pytest.mark.slow

MIB = 1 << 20
STORE_BYTES = 256 * MIB
BUCKET_MIB = 8
NUM_TENSORS = 12
TENSOR_BYTES = 8 * MIB + 12
"""Buckets begin in the middle of tensors."""
PIECE_BYTES = MIB
SLACK_BYTES = 3 * MIB
"""Of a process at work: pages of the allocator, Ray's own buffers."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    with two_nodes(STORE_BYTES) as nodes:
        yield nodes


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slipstream-test-", dir="/dev/shm") as path:
        yield Path(path)


def config(directory: Path, **settings: Any) -> WeightsConfig:
    return WeightsConfig.model_validate(
        {
            "transport": TransportKind.RAY,
            "bucket_mib": BUCKET_MIB,
            "shared_memory_dir": str(directory),
        }
        | settings
    )


def tensor(name: str) -> Bytes:
    return np.random.default_rng(len(name)).integers(0, 256, TENSOR_BYTES, np.uint8)


def specs() -> list[TensorSpec]:
    return [TensorSpec("w" * i, "U8", (TENSOR_BYTES,)) for i in range(1, NUM_TENSORS + 1)]


def pieces(spec: TensorSpec) -> Iterator[Bytes]:
    data = tensor(spec.name)
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def committed(directory: Path, version: int) -> CommittedSnapshot:
    path = directory / segment_name(os.getpid(), version, SegmentKind.SERVER)
    return CommittedSnapshot(
        version=version, path=str(path), manifest=write_segment(path, specs(), pieces)
    )


class Trainer:
    """Runs as an actor on the second node; its server only tells the receiver's name."""

    def __init__(self, settings: WeightsConfig, receiver: str) -> None:
        client: Any = SimpleNamespace(weights=lambda: SimpleNamespace(receiver=receiver))
        self._outbox = RayOutbox(settings, client)
        self._kill_at = -1
        self._receiver_pid = 0

    def pid(self) -> int:
        return os.getpid()

    def kill_at(self, tensor: int, receiver_pid: int) -> None:
        """Kill the receiver when it comes to this tensor."""
        self._kill_at, self._receiver_pid = tensor, receiver_pid

    def send(self, version: int) -> WeightManifest | str:
        try:
            return self._outbox.write(version, specs(), self._produce).manifest
        except SlipstreamError as exc:
            return exc.message

    def discard(self) -> None:
        self._outbox.discard()

    def _produce(self, spec: TensorSpec) -> Iterator[Bytes]:
        if len(spec.name) == self._kill_at:
            self._kill_at = -1
            os.kill(self._receiver_pid, signal.SIGKILL)
        yield from pieces(spec)


def trainer_on_second(settings: WeightsConfig, receiver: str | None) -> Any:
    assert receiver is not None
    actor = ray.remote(Trainer).options(num_cpus=0, resources={"second": 1})
    return actor.remote(settings, receiver)


def pid_of(name: str | None) -> int:
    assert name is not None
    namespace, _, actor = name.rpartition("/")
    handle = ray.get_actor(actor, namespace=namespace)
    return int(ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=30))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_a_trainer_on_another_node_sends_two_buckets_at_most(
    cluster: TwoNodes, directory: Path
) -> None:
    settings = config(directory)
    files = await start_snapshot_files(settings)
    try:
        trainer = trainer_on_second(settings, files.receiver)
        trainer_pid = await trainer.pid.remote()
        before = cluster.store_bytes()
        with PeakMemory(trainer_pid) as sender, PeakMemory(pid_of(files.receiver)) as receiver:
            manifest = await trainer.send.remote(5)
        assert isinstance(manifest, WeightManifest), manifest
        after = cluster.store_bytes()
        stores = {node: after[node] - before[node] for node in after}
        print(
            f"sender {sender.extra_bytes / MIB:.1f}, receiver {receiver.extra_bytes / MIB:.1f}, "
            f"stores {[value / MIB for value in stores.values()]} MiB"
        )
        verify_segment(directory / manifest.segment, manifest)
        assert names(directory) == [manifest.segment]
        limit_bytes = 2 * BUCKET_MIB * MIB + SLACK_BYTES
        # A whole tensor is made at a time here: a policy's lie in memory anyway.
        sent_bytes = sender.extra_bytes - TENSOR_BYTES
        assert sent_bytes + stores[cluster.second_id] <= limit_bytes
        assert receiver.extra_bytes + stores[cluster.first_id] <= limit_bytes
        await trainer.discard.remote()
        assert names(directory) == []
    finally:
        await files.close()


async def test_a_copy_on_another_node_takes_two_buckets_at_most(
    cluster: TwoNodes, directory: Path
) -> None:
    settings = config(directory)
    snapshot = await asyncio.to_thread(committed, directory, 7)
    nodes = RayNodes(settings)
    try:
        port = await nodes.port(cluster.second_id)
        assert not await port.holds(7)
        copies = await nodes.actor(cluster.second_id)
        copies_pid = await copies.__ray_call__.remote(lambda _: os.getpid())
        before = cluster.store_bytes()
        with PeakMemory(os.getpid()) as sender, PeakMemory(copies_pid) as receiver:
            outcomes = await Spread(nodes, snapshot, settings).run([cluster.second_id])
        after = cluster.store_bytes()
        stores = {node: after[node] - before[node] for node in after}
        print(
            f"sender {sender.extra_bytes / MIB:.1f}, receiver {receiver.extra_bytes / MIB:.1f}, "
            f"stores {[value / MIB for value in stores.values()]} MiB"
        )
        path = outcomes[cluster.second_id].path
        assert path == str(directory / segment_name(copies_pid, 7, SegmentKind.NODE))
        assert filecmp.cmp(path, snapshot.path, shallow=False)
        limit_bytes = 2 * BUCKET_MIB * MIB + SLACK_BYTES
        assert sender.extra_bytes + stores[cluster.first_id] <= limit_bytes
        assert receiver.extra_bytes + stores[cluster.second_id] <= limit_bytes
        await port.remove(7)
        assert names(directory) == [os.path.basename(snapshot.path)]
    finally:
        await nodes.close()


async def test_a_receiver_that_is_killed_ends_that_upload_and_not_the_next(
    cluster: TwoNodes, directory: Path
) -> None:
    settings = config(directory)
    files = await start_snapshot_files(settings)
    try:
        trainer = trainer_on_second(settings, files.receiver)
        await trainer.kill_at.remote(6, pid_of(files.receiver))
        answer = await trainer.send.remote(1)
        assert isinstance(answer, str)
        assert "the server's receiver did not" in answer
        await trainer.discard.remote()
        manifest = await trainer.send.remote(2)
        assert isinstance(manifest, WeightManifest), manifest
        verify_segment(directory / manifest.segment, manifest)
        assert names(directory) == [manifest.segment], "the half segment is swept"
    finally:
        await files.close()
    assert names(directory) == []


async def test_copies_that_were_killed_with_their_owner_are_made_again(
    cluster: TwoNodes, directory: Path
) -> None:
    settings = config(directory)
    snapshot = await asyncio.to_thread(committed, directory, 1)
    nodes = RayNodes(settings)
    try:
        for _ in range(2):
            copies = await nodes.actor(cluster.second_id)
            pid = await copies.__ray_call__.remote(lambda _: os.getpid())
            os.kill(pid, signal.SIGKILL)
            outcomes = await Spread(nodes, snapshot, settings).run([cluster.second_id])
            path = outcomes[cluster.second_id].path
            assert path is not None, outcomes
            assert filecmp.cmp(path, snapshot.path, shallow=False)
            assert not await nodes.is_lost(cluster.second_id)
        assert len(names(directory)) == 2, "the copy before is swept"
    finally:
        await nodes.close()
    assert names(directory) == [os.path.basename(snapshot.path)]


async def test_a_store_that_is_too_small_is_refused_at_the_start(
    cluster: TwoNodes, directory: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"bucket_mib 200 do not fit.*object_store_mib"):
        await start_snapshot_files(config(directory, bucket_mib=200))


class LosingNodes(RayNodes):
    """Loses the second node with the third bucket."""

    def __init__(self, settings: WeightsConfig, cluster: TwoNodes) -> None:
        super().__init__(settings)
        self._cluster = cluster
        self._num_puts = 0

    async def put(self, data: Bytes) -> object:
        self._num_puts += 1
        if self._num_puts == 3:
            await asyncio.to_thread(self._cluster.lose_second)
        return await super().put(data)


async def test_a_node_lost_in_the_middle_is_known_to_be_lost(
    cluster: TwoNodes, directory: Path
) -> None:
    settings = config(directory)
    snapshot = await asyncio.to_thread(committed, directory, 1)
    nodes = LosingNodes(settings, cluster)
    lost = cluster.second_id
    try:
        async with asyncio.timeout(60):
            outcomes = await Spread(nodes, snapshot, settings).run([lost])
            assert isinstance(outcomes[lost], NodeOutcome)
            assert outcomes[lost].path is None
            assert await nodes.is_lost(lost), outcomes
            with pytest.raises(WeightTransferError):
                await (await nodes.port(lost)).begin(2, 1)
    finally:
        await nodes.close()
        cluster.add_second()
