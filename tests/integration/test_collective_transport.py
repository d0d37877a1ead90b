"""One broadcast from a trainer to the receivers of two Ray nodes, over gloo: the bytes, the memory
they take, and members that are killed or stand still on the way."""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from benchmarks.harness.ray_nodes import PeakMemory, TwoNodes, two_nodes
from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.transports.collective_transport import CollectiveNodes
from rollout_server.weights.transports.node_files import NodeFiles
from rollout_server.weights.transports.spread import Bytes
from rollout_server.weights.verify import verify_segment
from shared.collective import BroadcastBackend
from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError, WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorSpec
from shared.types import TransportKind
from tests.fakes.weight_push import FakeEngine
from trainer.collective_transport import CollectiveOutbox

pytestmark = pytest.mark.slow

MIB = 1 << 20
BUCKET_MIB = 8
NUM_TENSORS = 12
TENSOR_BYTES = 8 * MIB + 12
"""Buckets begin in the middle of tensors."""
SLACK_BYTES = 4 * MIB
"""Of a process at work: pages of the allocator, threads, sockets."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    with two_nodes(256 * MIB) as nodes:
        yield nodes


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slipstream-test-", dir="/dev/shm") as path:
        yield Path(path)


def specs() -> list[TensorSpec]:
    return [TensorSpec("w" * i, "U8", (TENSOR_BYTES,)) for i in range(1, NUM_TENSORS + 1)]


def pieces(spec: TensorSpec) -> Iterator[Bytes]:
    yield np.random.default_rng(len(spec.name)).integers(0, 256, TENSOR_BYTES, np.uint8)


class Trainer:
    """Runs as an actor on the second node; its server only tells the receivers' names."""

    def __init__(self, settings: WeightsConfig, receiver: str, others: list[str]) -> None:
        told = SimpleNamespace(receiver=receiver, node_receivers=others)
        client: Any = SimpleNamespace(weights=lambda: told)
        self._outbox = CollectiveOutbox(settings, client)
        self._signal_at = (-1, 0, 0)

    def pid(self) -> int:
        return os.getpid()

    def signal_at(self, tensor: int, pid: int, number: int) -> None:
        """Send a signal to a process when it comes to this tensor."""
        self._signal_at = (tensor, pid, number)

    def send(self, version: int) -> WeightManifest | str:
        try:
            manifest = self._outbox.write(version, specs(), self._produce).manifest
        except SlipstreamError as exc:
            return exc.message
        assert self._outbox.backend is BroadcastBackend.GLOO
        return manifest

    def discard(self) -> None:
        self._outbox.discard()

    def _produce(self, spec: TensorSpec) -> Iterator[Bytes]:
        tensor, pid, number = self._signal_at
        if len(spec.name) == tensor:
            self._signal_at = (-1, 0, 0)
            os.kill(pid, number)
        yield from pieces(spec)


class World:
    """The server's side on the first node, with an engine on the second."""

    def __init__(self, cluster: TwoNodes, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.settings = WeightsConfig.model_validate(
            {
                "transport": TransportKind.NCCL,
                "bucket_mib": BUCKET_MIB,
                "shared_memory_dir": str(directory),
            }
            | settings
        )
        self.nodes = CollectiveNodes(self.settings)
        self.engine = FakeEngine("far")
        self.engine.node_id = cluster.second_id

    async def start(self) -> None:
        self.receiver = await self.nodes.start_receiver()
        self.files = NodeFiles(self.nodes, self.settings, self.receiver)
        await self.files.welcome(self.handle)
        (self.other,) = self.files.node_receivers([self.handle])

    @property
    def handle(self) -> EngineHandle:
        engine: Any = self.engine
        return engine

    def trainer(self) -> Any:
        actor = ray.remote(Trainer).options(num_cpus=0, resources={"second": 1})
        return actor.remote(self.settings, self.receiver, [self.other])

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def snapshot(self, version: int, manifest: WeightManifest) -> CommittedSnapshot:
        path = self.directory / manifest.segment
        return CommittedSnapshot(version=version, path=str(path), manifest=manifest)

    async def without_files(self) -> None:
        """A receiver that was killed takes a moment to come back, and sweeps then."""
        while self.names():  # noqa: ASYNC110 - files of another process
            await asyncio.sleep(0.05)

    async def sends(self, trainer: Any, version: int) -> WeightManifest:
        """What the next push brings to both nodes."""
        await until_it_answers(self.receiver)
        await until_it_answers(self.other)
        manifest = await trainer.send.remote(version)
        assert isinstance(manifest, WeightManifest), manifest
        verify_segment(self.directory / manifest.segment, manifest)
        assert await self.nodes.delivered(self.engine.node_id, manifest.segment) is not None
        assert len(self.names()) == 2, "nothing is left of the push before"
        await trainer.discard.remote()
        assert self.names() == []
        return manifest


@contextlib.asynccontextmanager
async def started(cluster: TwoNodes, directory: Path, **settings: Any) -> AsyncIterator[World]:
    world = World(cluster, directory, **settings)
    try:
        await world.start()
        yield world
    finally:
        await world.files.close()
    assert world.names() == []


def actor_of(name: str) -> Any:
    namespace, _, actor = name.rpartition("/")
    return ray.get_actor(actor, namespace=namespace)


async def pid_of(name: str) -> int:
    pid: int = await actor_of(name).__ray_call__.remote(lambda _: os.getpid())
    return pid


async def until_it_answers(name: str) -> None:
    while True:
        with contextlib.suppress(ray.exceptions.RayError):
            await actor_of(name).ready.remote()
            return
        await asyncio.sleep(0.1)


async def test_both_nodes_have_it_and_two_buckets_are_the_most_in_memory(
    cluster: TwoNodes, directory: Path
) -> None:
    async with started(cluster, directory) as world:
        trainer = world.trainer()
        # Once before: torch and the first group's threads are no part of a bucket.
        await world.sends(trainer, 4)
        with (
            PeakMemory(await trainer.pid.remote()) as sender,
            PeakMemory(await pid_of(world.receiver)) as near,
            PeakMemory(await pid_of(world.other)) as far,
        ):
            manifest = await trainer.send.remote(5)
        assert isinstance(manifest, WeightManifest), manifest
        snapshot = world.snapshot(5, manifest)
        before = cluster.store_bytes()
        assert await world.files.bring(snapshot, [world.handle])
        assert cluster.store_bytes() == before, "the server has sent nothing"
        path = world.files.path_for(world.handle, snapshot.path)
        await trainer.discard.remote()
        assert world.names() == [Path(path).name], "the copy stays, what was sent goes"
        copy = CommittedSnapshot(version=5, path=path, manifest=manifest)
        verify_segment(Path(copy.path), manifest)
        # A whole tensor is made at a time here: a policy's lie in memory anyway.
        sent_bytes = sender.extra_bytes - TENSOR_BYTES
        figures = [sent_bytes, near.extra_bytes, far.extra_bytes]
        print("sender, near, far:", [f"{value / MIB:.1f} MiB" for value in figures])
        assert max(figures) <= 2 * BUCKET_MIB * MIB + SLACK_BYTES


async def test_what_was_left_out_of_the_broadcast_the_server_brings(
    cluster: TwoNodes, directory: Path
) -> None:
    async with started(cluster, directory) as world:
        ray.kill(actor_of(world.other), no_restart=True)
        trainer = world.trainer()
        manifest = await trainer.send.remote(1)
        assert isinstance(manifest, WeightManifest), manifest
        snapshot = world.snapshot(1, manifest)
        assert await world.files.bring(snapshot, [world.handle])
        path = world.files.path_for(world.handle, snapshot.path)
        assert path != snapshot.path
        assert filecmp.cmp(path, snapshot.path, shallow=False)
        await trainer.discard.remote()


@pytest.mark.parametrize("which", ["receiver", "other"])
async def test_a_killed_receiver_ends_that_push_and_not_the_next(
    cluster: TwoNodes, directory: Path, which: str
) -> None:
    async with started(cluster, directory) as world:
        name = getattr(world, which)
        trainer = world.trainer()
        await trainer.signal_at.remote(6, await pid_of(name), signal.SIGKILL)
        answer = await trainer.send.remote(1)
        assert isinstance(answer, str)
        assert f"receiver {name}: the server's receiver did not" in answer
        await trainer.discard.remote()
        await world.without_files()
        await world.sends(trainer, 1)


async def test_a_killed_trainer_leaves_nothing_and_the_next_one_pushes(
    cluster: TwoNodes, directory: Path
) -> None:
    async with started(cluster, directory) as world:
        trainer = world.trainer()
        await trainer.signal_at.remote(6, await trainer.pid.remote(), signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await trainer.send.remote(1)
        # Nobody told the receivers: they have seen it themselves.
        await world.without_files()
        await world.sends(world.trainer(), 1)


async def test_a_receiver_that_stands_still_ends_the_push_in_bounded_time(
    cluster: TwoNodes, directory: Path
) -> None:
    async with started(cluster, directory, bucket_timeout_s=2.0) as world:
        pid = await pid_of(world.other)
        trainer = world.trainer()
        await world.sends(trainer, 1)
        await trainer.signal_at.remote(6, pid, signal.SIGSTOP)
        try:
            answer = await trainer.send.remote(2)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert isinstance(answer, str)
        assert "did not get through within weights.bucket_timeout_s 2" in answer
        await trainer.discard.remote()
        await world.without_files()
        await world.sends(trainer, 2)


async def test_a_trainer_of_another_transport_is_told(cluster: TwoNodes, directory: Path) -> None:
    client: Any = SimpleNamespace(weights=lambda: SimpleNamespace(receiver=None, node_receivers=[]))
    outbox = CollectiveOutbox(WeightsConfig(transport=TransportKind.NCCL), client)
    with pytest.raises(WeightTransferError, match="transport is nccl here, but the server"):
        outbox.write(1, specs(), pieces)
