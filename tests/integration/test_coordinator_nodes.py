"""Pushes to engines on several machines: which file each opens, and what stays where."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.errors import EngineDeadError, WeightTransferError, WeightVerificationError
from shared.types import EngineState, TransportKind
from shared.weights import SegmentKind, segment_name
from tests.fakes.cluster_nodes import OWN_NODE, FakeNodes
from tests.fakes.weight_push import FakeEngine, PushWorld, StartWorld, worlds


def copy_of(version: int) -> str:
    return segment_name(os.getpid(), version, SegmentKind.NODE)


class ManyNodes:
    """An engine beside the server, two on another node, one on a third."""

    def __init__(self, directory: Path, start: StartWorld) -> None:
        self._start = start
        self.nodes = FakeNodes(directory / "nodes")
        self.near, self.far, self.beside_far, self.third = engines = [
            FakeEngine(f"e{i}") for i in range(4)
        ]
        for engine, node in zip(engines, (OWN_NODE, "far", "far", "third"), strict=True):
            engine.node_id = node
        self.engines = engines

    def start(self, **settings: object) -> PushWorld:
        world = self._start(nodes=self.nodes, transport=TransportKind.RAY, **settings)
        world.pool.members = list(self.engines)
        return world

    def files(self, node_id: str) -> list[str]:
        return self.nodes.node(node_id).files()


@pytest_asyncio.fixture
async def many(tmp_path: Path) -> AsyncIterator[ManyNodes]:
    async with worlds(tmp_path) as start:
        yield ManyNodes(tmp_path, start)


async def test_each_engine_opens_the_file_of_its_own_node(many: ManyNodes) -> None:
    world = many.start()
    response = await world.push(1, 0, (5.0, 6.0))
    assert [engine.loaded for engine in many.engines] == [[5.0, 6.0]] * 4
    own = world.directory / segment_name(os.getpid(), 1, SegmentKind.SERVER)
    far = many.nodes.node("far")
    assert many.near.staged_paths == [str(own)]
    assert (
        many.far.staged_paths == many.beside_far.staged_paths == [str(far.directory / copy_of(1))]
    )
    assert (far.num_begun, many.nodes.node("third").num_begun) == (1, 1)
    assert OWN_NODE not in many.nodes.nodes
    assert response.phases_s["spreading"] > 0
    assert (await world.coordinator.audit()).is_intact
    assert many.near.audited == [str(own)]
    assert many.far.audited == many.far.staged_paths
    assert world.coordinator.status().receiver == "test/receiver"


async def test_the_model_directory_is_the_same_everywhere(many: ManyNodes) -> None:
    await many.start().coordinator.audit()
    assert [engine.audited for engine in many.engines] == [["model"]] * 4


async def test_copies_go_with_the_next_commit_and_with_the_server(many: ManyNodes) -> None:
    world = many.start()
    await world.push(1, 0)
    assert many.files("far") == many.files("third") == [copy_of(1)]
    await world.push(2, 1)
    assert many.files("far") == many.files("third") == [copy_of(2)]
    await world.coordinator.close()
    assert many.nodes.is_closed
    assert many.files("far") == many.files("third") == []


async def test_a_refused_push_leaves_the_copies_of_the_version_before(many: ManyNodes) -> None:
    world = many.start()
    await world.push(1, 0)
    many.far.stage_error = WeightVerificationError("does not fit")
    with pytest.raises(WeightVerificationError):
        await world.push(2, 1)
    assert many.files("far") == many.files("third") == [copy_of(1)]
    many.far.stage_error = None
    await world.push(2, 1)
    assert many.files("far") == [copy_of(2)]


async def test_engines_go_back_from_the_copy_of_their_node(many: ManyNodes) -> None:
    world = many.start(commit_policy="all")
    await world.push(1, 0, (1.0, 2.0))
    many.near.commit_error = EngineDeadError("gone")
    with pytest.raises(WeightTransferError, match="e1, e2, e3 went back to version 1"):
        await world.push(2, 1, (3.0, 4.0))
    assert many.far.loads == [1, 2, 1]
    assert many.far.loaded == [1.0, 2.0]
    assert many.far.staged_paths[-1] == str(many.nodes.node("far").directory / copy_of(1))
    assert many.files("far") == [copy_of(1)]


async def test_a_node_lost_on_the_way_takes_its_engines_with_it_and_no_others(
    many: ManyNodes,
) -> None:
    world = many.start()
    await world.push(1, 0)
    many.nodes.node("far").lost_at = 0
    response = await world.push(2, 1, (3.0, 4.0))
    assert [timings.engine_id for timings in response.engines] == ["e0", "e3"]
    assert [engine.state for engine in many.engines] == [
        EngineState.SERVING,
        EngineState.DEAD,
        EngineState.DEAD,
        EngineState.SERVING,
    ]
    assert many.far.loads == [1]
    assert many.third.loaded == [3.0, 4.0]
    # A node is taken for what it is now: this one came back under its old name.
    many.nodes.node("far").is_lost = False
    many.nodes.node("far").lost_at = None
    late = FakeEngine("late", EngineState.STARTING)
    late.node_id = "far"
    await world.join(late)
    assert late.loaded == [3.0, 4.0]


async def test_a_node_that_lives_and_cannot_take_it_refuses_the_push(many: ManyNodes) -> None:
    world = many.start(bucket_timeout_s=0.2)
    await world.push(1, 0)
    many.nodes.node("far").hangs_at = 0
    with pytest.raises(
        WeightTransferError,
        match=r"engine e1: version 2 is not on its node far: no answer .*bucket_timeout_s 0\.2",
    ):
        await world.push(2, 1)
    assert world.versions() == [1, 1, 1, 1]
    assert {engine.state for engine in many.engines} == {EngineState.SERVING}
    assert many.files("far") == many.files("third") == [copy_of(1)]
    many.nodes.node("far").hangs_at = None
    await world.push(2, 1)
    assert world.versions() == [2, 2, 2, 2]


async def test_late_joiners_share_the_copy_of_their_node(many: ManyNodes) -> None:
    world = many.start()
    world.pool.members = [many.near]
    await world.push(1, 0, (7.0, 8.0))
    for engine in (many.far, many.beside_far):
        engine.state = EngineState.STARTING
        world.pool.members.append(engine)
        await world.join(engine)
    assert many.far.loaded == many.beside_far.loaded == [7.0, 8.0]
    assert many.nodes.node("far").num_begun == 1
    await world.push(2, 1)
    assert many.files("far") == [copy_of(2)]


async def test_a_copy_that_was_swept_is_brought_again(many: ManyNodes) -> None:
    world = many.start()
    await world.push(1, 0, (7.0, 8.0))
    (many.nodes.node("far").directory / copy_of(1)).unlink()
    late = FakeEngine("late", EngineState.STARTING)
    late.node_id = "far"
    await world.join(late)
    assert late.loaded == [7.0, 8.0]
    assert many.nodes.node("far").num_begun == 2


async def test_a_server_that_closes_while_it_spreads_leaves_nothing(many: ManyNodes) -> None:
    world = many.start()
    far = many.nodes.node("far")
    far.hangs_at = 0
    push = asyncio.create_task(world.push(1, 0))
    await far.hanging.wait()
    await world.coordinator.close()
    with pytest.raises(Exception, match="shutting down"):
        await push
    assert many.files("far") == many.files("third") == world.files() == []
