"""Pushes that a trainer has broadcast: what has come to a node is verified there and served, and
what has not, the server brings."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from shared.types import EngineState, TransportKind
from shared.weights import SegmentKind, segment_name
from tests.fakes.cluster_nodes import OWN_NODE, FakeNodes
from tests.fakes.weight_push import FakeEngine, PushWorld, worlds

SENT = "sent-to-far"


class BroadcastWorld:
    """An engine beside the server and one on another node."""

    def __init__(self, world: PushWorld, nodes: FakeNodes) -> None:
        self.world = world
        self.nodes = nodes
        self.near, self.far = FakeEngine("near"), FakeEngine("far", EngineState.STARTING)
        self.near.node_id, self.far.node_id = OWN_NODE, "far"
        world.pool.members = [self.near]

    async def join(self) -> None:
        await self.world.join(self.far)
        self.far.state = EngineState.SERVING
        self.world.pool.members = [self.near, self.far]

    def deliver(self, version: int, values: tuple[float, float]) -> Path:
        """What a broadcast leaves on the other node."""
        manifest = self.world.write(version, values)
        sent = self.nodes.node("far").directory / SENT
        sent.write_bytes((self.world.directory / manifest.segment).read_bytes())
        self.nodes.deliveries["far", manifest.segment] = str(sent)
        return sent


@pytest_asyncio.fixture
async def broadcast(tmp_path: Path) -> AsyncIterator[BroadcastWorld]:
    nodes = FakeNodes(tmp_path / "nodes")
    async with worlds(tmp_path) as start:
        yield BroadcastWorld(start(nodes=nodes, transport=TransportKind.NCCL), nodes)


def copy_of(version: int) -> str:
    return segment_name(os.getpid(), version, SegmentKind.NODE)


async def test_what_has_come_to_a_node_is_served_from_there(broadcast: BroadcastWorld) -> None:
    await broadcast.join()
    sent = broadcast.deliver(1, (5.0, 6.0))
    response = await broadcast.world.push(1, 0, (5.0, 6.0))
    assert broadcast.near.loaded == broadcast.far.loaded == [5.0, 6.0]
    assert broadcast.nodes.num_puts == 0, "the server has sent nothing"
    assert response.phases_s["spreading"] > 0
    assert broadcast.nodes.node("far").files() == sorted([SENT, copy_of(1)])
    sent.unlink()  # the trainer's part is over
    late = FakeEngine("late", EngineState.STARTING)
    late.node_id = "far"
    await broadcast.world.join(late)
    assert late.loaded == [5.0, 6.0]
    assert broadcast.nodes.num_puts == 0


async def test_what_was_damaged_on_the_way_is_not_served(broadcast: BroadcastWorld) -> None:
    await broadcast.join()
    sent = broadcast.deliver(1, (5.0, 6.0))
    damaged = bytearray(sent.read_bytes())
    damaged[-1] ^= 1
    sent.write_bytes(damaged)
    await broadcast.world.push(1, 0, (5.0, 6.0))
    assert broadcast.far.loaded == [5.0, 6.0]
    assert broadcast.nodes.num_puts == 1, "the server has brought it"
    assert broadcast.nodes.node("far").files() == sorted([SENT, copy_of(1)])


async def test_a_node_that_the_broadcast_left_out_is_brought_it(broadcast: BroadcastWorld) -> None:
    await broadcast.join()
    await broadcast.world.push(1, 0, (5.0, 6.0))
    assert broadcast.far.loaded == [5.0, 6.0]
    assert broadcast.nodes.num_puts == 1


async def test_receivers_are_started_and_named_where_engines_are(broadcast: BroadcastWorld) -> None:
    world = broadcast.world
    assert world.coordinator.status().node_receivers == []
    await broadcast.join()
    assert broadcast.nodes.welcomed == ["far"]
    status = world.coordinator.status()
    assert (status.receiver, status.node_receivers) == ("test/receiver", ["test/far"])
    world.pool.members = [broadcast.near]
    assert world.coordinator.status().node_receivers == [], "nobody serves there any more"


async def test_an_engine_joins_where_no_receiver_starts(broadcast: BroadcastWorld) -> None:
    await broadcast.world.push(1, 0, (5.0, 6.0))
    broadcast.nodes.node("far").is_lost = True
    broadcast.far.committed_version = 1  # it needs nothing brought
    await broadcast.join()
    assert broadcast.world.coordinator.status().node_receivers == []
