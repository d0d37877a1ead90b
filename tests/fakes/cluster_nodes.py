"""Machines of a cluster in one process: real copies in a directory each, and an object store that
counts what is in it. Nodes can be lost, hang, run full and damage what they are sent."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path

import numpy as np

from rollout_server.weights.transports.node_copies import NodeCopies
from rollout_server.weights.transports.spread import Bytes
from shared.errors import WeightTransferError
from shared.schemas.weights import WeightManifest

OWN_NODE = "own"


class Bucket:
    """What ``put`` returns: it is in the store as long as somebody holds it."""

    def __init__(self, data: Bytes) -> None:
        self.data = data.copy()
        self.data.setflags(write=False)  # as Ray hands out what is in its store


class FakeNode:
    """Implements ``spread.NodePort``."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.copies = NodeCopies(str(directory))
        self.num_begun = 0
        self.num_buckets = 0
        self.is_lost = False
        self.lost_at: int | None = None
        """Bucket with which the node is lost."""
        self.hangs_at: int | None = None
        self.hanging = asyncio.Event()
        self.damages_at: int | None = None
        self.skips_at: int | None = None

    async def begin(self, version: int, num_bytes: int) -> None:
        self._check()
        self.num_begun += 1
        self.num_buckets = 0
        self.copies.begin(version, num_bytes)

    async def append(self, version: int, offset: int, bucket: object) -> None:
        number, self.num_buckets = self.num_buckets, self.num_buckets + 1
        if number == self.lost_at:
            self.is_lost = True
        self._check()
        if number == self.hangs_at:
            self.hanging.set()
            await asyncio.Event().wait()
        if number == self.skips_at:
            return
        assert isinstance(bucket, Bucket)
        data = bucket.data
        if number == self.damages_at:
            data = data.copy()
            data[-1] ^= 1
        await asyncio.sleep(0)
        self.copies.append(version, offset, data)

    async def finish(self, version: int, manifest: WeightManifest) -> str:
        self._check()
        return self.copies.finish(version, manifest)

    async def adopt(self, version: int, source: str, manifest: WeightManifest) -> str:
        self._check()
        return self.copies.adopt(version, source, manifest)

    async def holds(self, version: int) -> bool:
        self._check()
        return self.copies.holds(version)

    async def remove(self, version: int) -> None:
        self._check()
        self.copies.remove(version)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def _check(self) -> None:
        if self.is_lost:
            raise WeightTransferError("the receiver is gone")


class FakeNodes:
    """Implements ``spread.ClusterNodes``."""

    own_node_id = OWN_NODE

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.nodes: dict[str, FakeNode] = {}
        self.num_puts = 0
        self.max_in_store = 0
        self.max_bucket_bytes = 0
        self.is_closed = False
        self.welcomed: list[str] = []
        self.deliveries: dict[tuple[str, str], str] = {}
        """Paths of what was broadcast, by node and segment."""
        self._in_store: weakref.WeakSet[Bucket] = weakref.WeakSet()

    def node(self, node_id: str) -> FakeNode:
        if node_id not in self.nodes:
            self.nodes[node_id] = FakeNode(self._directory / node_id)
        return self.nodes[node_id]

    async def port(self, node_id: str) -> FakeNode:
        return self.node(node_id)

    async def welcome(self, node_id: str) -> None:
        if self.node(node_id).is_lost:
            raise WeightTransferError("nothing starts there")
        self.welcomed.append(node_id)

    def receiver_on(self, node_id: str) -> str | None:
        return f"test/{node_id}" if node_id in self.welcomed else None

    async def delivered(self, node_id: str, segment: str) -> str | None:
        return self.deliveries.get((node_id, segment))

    async def put(self, data: Bytes) -> object:
        bucket = Bucket(np.asarray(data))
        self._in_store.add(bucket)
        self.num_puts += 1
        self.max_in_store = max(self.max_in_store, len(self._in_store))
        self.max_bucket_bytes = max(self.max_bucket_bytes, data.nbytes)
        return bucket

    async def is_lost(self, node_id: str) -> bool:
        return self.nodes[node_id].is_lost

    async def close(self) -> None:
        self.is_closed = True
        for node in self.nodes.values():
            if not node.is_lost:
                node.copies.close()
