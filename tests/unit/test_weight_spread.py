"""From the server to other nodes: bounded, once per node, and nobody waits for one that is gone."""

from __future__ import annotations

import asyncio
import filecmp
import os
from pathlib import Path

import numpy as np
import pytest

from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.transports.spread import NodeOutcome, Spread
from shared.config.weights import WeightsConfig
from shared.errors import WeightTransferError
from shared.types import TransportKind
from shared.weights import build_manifest, write_safetensors
from tests.fakes.cluster_nodes import FakeNodes

MIB = 1 << 20
NUM_BUCKETS = 6


def config(**settings: float) -> WeightsConfig:
    return WeightsConfig.model_validate(
        {"transport": TransportKind.RAY, "bucket_mib": 2} | settings
    )


@pytest.fixture
def snapshot(tmp_path: Path) -> CommittedSnapshot:
    """Five buckets and a bit."""
    path = tmp_path / "slipstream-server-1-v7.safetensors"
    values = np.random.default_rng(0).standard_normal(5 * MIB // 4 + 999).astype(np.float32)
    write_safetensors(path, [("a", "F32", values.shape, values)])
    return CommittedSnapshot(version=7, path=str(path), manifest=build_manifest(path))


async def spread(
    nodes: FakeNodes, snapshot: CommittedSnapshot, *names: str, **settings: float
) -> dict[str, NodeOutcome]:
    return await Spread(nodes, snapshot, config(**settings)).run(names)


async def test_every_node_gets_a_copy_and_two_buckets_are_the_most_in_memory(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    outcomes = await spread(nodes, snapshot, "b", "c")
    for name in ("b", "c"):
        path = outcomes[name].path
        assert path is not None
        assert Path(path).parent == nodes.node(name).directory
        assert filecmp.cmp(path, snapshot.path, shallow=False)
    # Once for both nodes; beside the one in the store, the next may have been read already.
    assert nodes.num_puts == NUM_BUCKETS
    assert nodes.max_in_store == 1
    assert nodes.max_bucket_bytes == MIB


async def test_a_node_lost_in_the_middle_is_left_behind(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    nodes.node("b").lost_at = 2
    outcomes = await spread(nodes, snapshot, "b", "c")
    assert outcomes["b"] == NodeOutcome(error="the receiver is gone")
    assert outcomes["c"].path is not None
    assert nodes.node("b").num_buckets == 3


async def test_a_node_that_hangs_is_left_behind_after_the_time_of_a_bucket(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    nodes.node("b").hangs_at = 1
    outcomes = await spread(nodes, snapshot, "b", "c", bucket_timeout_s=0.2)
    assert outcomes["b"].error == (
        "no answer for bytes of version 7 from 1048576 within weights.bucket_timeout_s 0.2"
    )
    assert nodes.node("b").files() == []
    assert outcomes["c"].path is not None


async def test_a_transfer_that_takes_too_long_leaves_nothing(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    nodes.node("b").hangs_at = 1
    outcomes = await spread(nodes, snapshot, "b", "c", transfer_timeout_s=0.2)
    for name in ("b", "c"):
        assert "did not arrive within weights.transfer_timeout_s 0.2" in outcomes[name].error
        assert nodes.node(name).files() == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damages_at", "tensor 'a': expected digest"),
        ("skips_at", "starts at byte 5242880, byte 4194304 is next"),
    ],
)
async def test_damage_on_the_way_is_seen_on_the_node(
    tmp_path: Path, snapshot: CommittedSnapshot, what: str, message: str
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    setattr(nodes.node("b"), what, 4)
    outcomes = await spread(nodes, snapshot, "b", "c")
    assert message in outcomes["b"].error
    assert nodes.node("b").files() == []
    assert outcomes["c"].path is not None


async def test_a_node_that_cannot_make_the_file_is_left_behind(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    nodes.node("b").directory.rmdir()
    outcomes = await spread(nodes, snapshot, "b", "c")
    assert "cannot be made: No such file or directory" in outcomes["b"].error
    assert outcomes["c"].path is not None


async def test_nothing_is_read_for_nodes_that_are_all_gone(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    nodes.node("b").is_lost = True
    outcomes = await spread(nodes, snapshot, "b")
    assert outcomes == {"b": NodeOutcome(error="the receiver is gone")}
    assert nodes.num_puts == 0


async def test_a_file_that_became_shorter_is_an_error_and_leaves_no_copies(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    node = nodes.node("b")
    append = node.append

    async def truncating(version: int, offset: int, bucket: object) -> None:
        if offset == 2 * MIB:
            os.truncate(snapshot.path, 3 * MIB + 5)
        await append(version, offset, bucket)

    node.append = truncating  # type: ignore[method-assign]
    with pytest.raises(WeightTransferError, match="became shorter after it was verified"):
        await spread(nodes, snapshot, "b")
    assert node.files() == []


async def test_a_cancelled_spread_leaves_no_copies(
    tmp_path: Path, snapshot: CommittedSnapshot
) -> None:
    nodes = FakeNodes(tmp_path / "nodes")
    nodes.node("b").hangs_at = 2
    task = asyncio.create_task(spread(nodes, snapshot, "b", "c"))
    await nodes.node("b").hanging.wait()
    assert nodes.node("b").files() != []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nodes.node("b").files() == nodes.node("c").files() == []
