"""Carries one verified segment from the server to other nodes, piece by piece.

Each piece (half a bucket) is read once and put into the object store once, whatever the number of
nodes. One is on its way while the next is read. Nodes go in step; one that fails or does
not answer in time is left behind, and the others go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rollout_server.weights.snapshot import CommittedSnapshot
from shared.config.weights import WeightsConfig
from shared.errors import SlipstreamError, WeightTransferError
from shared.safetensors_file import open_regular_file
from shared.schemas.weights import WeightManifest

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
_T = TypeVar("_T")


class NodePort(Protocol):
    """The copies on one node, ``NodeCopies``, from afar. Raises ``SlipstreamError`` only."""

    async def begin(self, version: int, num_bytes: int) -> None: ...

    async def append(self, version: int, offset: int, bucket: object) -> None:
        """
        Args:
            bucket: what ``ClusterNodes.put`` returned.
        """
        ...

    async def finish(self, version: int, manifest: WeightManifest) -> str: ...

    async def adopt(self, version: int, source: str, manifest: WeightManifest) -> str:
        """Make a copy of what ``ClusterNodes.delivered`` has found there, verified; its path."""
        ...

    async def holds(self, version: int) -> bool:
        """Whether the copy is there; one whose owner was killed may have been swept."""
        ...

    async def remove(self, version: int) -> None: ...


class ClusterNodes(Protocol):
    """The machines of the cluster, and the store that carries bytes between them."""

    @property
    def own_node_id(self) -> str: ...

    async def port(self, node_id: str) -> NodePort:
        """
        Raises:
            WeightTransferError: nothing can be started there.
        """
        ...

    async def welcome(self, node_id: str) -> None:
        """Start what trainers broadcast to, if they do.

        Raises:
            WeightTransferError: it does not start.
        """
        ...

    def receiver_on(self, node_id: str) -> str | None:
        """What ``welcome`` has started, by name."""
        ...

    async def delivered(self, node_id: str, segment: str) -> str | None:
        """The path of what a trainer has broadcast to a node under this name, not verified.

        Raises:
            WeightTransferError: the node's receiver does not answer.
        """
        ...

    async def put(self, data: Bytes) -> object:
        """Copy a bucket into the store, where it stays as long as what is returned is held.

        Raises:
            WeightTransferError: it does not fit.
        """
        ...

    async def is_lost(self, node_id: str) -> bool:
        """Whether a node on which something has just failed is gone."""
        ...

    async def close(self) -> None:
        """End what runs on the nodes; their copies go with it. May be called again."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeOutcome:
    """What became of one node: either a path, or why not."""

    path: str | None = None
    error: str = ""


class Spread:
    """One segment to some nodes. ``run`` is called once."""

    def __init__(
        self, nodes: ClusterNodes, snapshot: CommittedSnapshot, config: WeightsConfig
    ) -> None:
        self._nodes = nodes
        self._snapshot = snapshot
        self._config = config
        self._ports: dict[str, NodePort] = {}
        self._outcomes: dict[str, NodeOutcome] = {}
        """Of the nodes that are done, well or not; the others still take buckets."""

    async def run(self, node_ids: Iterable[str]) -> dict[str, NodeOutcome]:
        """Bring it there, in at most ``weights.transfer_timeout_s``, then verify it there, in at
        most ``weights.stage_timeout_s``.

        Raises:
            WeightTransferError: the file cannot be read, or no bucket be put into the store.
        """
        version, limit_s = self._snapshot.version, self._config.transfer_timeout_s
        nodes = list(node_ids)
        try:
            try:
                async with asyncio.timeout(limit_s):
                    num_bytes = await asyncio.to_thread(_size_of, self._snapshot.path)
                    await asyncio.gather(*(self._begin(node, num_bytes) for node in nodes))
                    await self._send(num_bytes)
            except TimeoutError:
                error = (
                    f"version {version} did not arrive within weights.transfer_timeout_s "
                    f"{limit_s:g}"
                )
                late = [node for node in nodes if node not in self._outcomes]
                await asyncio.gather(*(self._fail(node, error) for node in late))
            await asyncio.gather(*(self._finish(node, port) for node, port in self._under_way()))
        except BaseException:  # also when cancelled: no copy of what nobody asks for stays behind
            await asyncio.gather(*(self._remove(node) for node in self._ports))
            raise
        return self._outcomes

    def _under_way(self) -> list[tuple[str, NodePort]]:
        return [item for item in self._ports.items() if item[0] not in self._outcomes]

    async def _begin(self, node_id: str, num_bytes: int) -> None:
        version, limit_s = self._snapshot.version, self._config.stage_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                port = await self._nodes.port(node_id)
                self._ports[node_id] = port
                await port.begin(version, num_bytes)
        except TimeoutError:
            error = f"it did not answer within weights.stage_timeout_s {limit_s:g}"
        except SlipstreamError as exc:
            error = exc.message
        else:
            return
        await self._fail(node_id, error)

    async def _send(self, num_bytes: int) -> None:
        piece_bytes = self._config.piece_bytes
        scratch = np.empty(min(piece_bytes, num_bytes), np.uint8)
        on_its_way: asyncio.Task[None] | None = None
        try:
            for offset in range(0, num_bytes, piece_bytes):
                data = scratch[: num_bytes - offset]
                await asyncio.to_thread(_read_at, self._snapshot.path, offset, data)
                if on_its_way is not None:
                    await on_its_way
                    on_its_way = None
                if not self._under_way():
                    return
                bucket = await self._nodes.put(data)
                on_its_way = asyncio.create_task(self._append(offset, bucket))
                del bucket  # the task's alone: gone from the store as soon as all nodes have it
            if on_its_way is not None:
                await on_its_way
        finally:
            if on_its_way is not None and not on_its_way.done():
                on_its_way.cancel()

    async def _append(self, offset: int, bucket: object) -> None:
        version = self._snapshot.version
        what = f"bytes of version {version} from {offset}"
        limit_s, setting = self._config.bucket_timeout_s, "bucket_timeout_s"
        await asyncio.gather(
            *(
                self._attempt(node, port.append(version, offset, bucket), what, limit_s, setting)
                for node, port in self._under_way()
            )
        )

    async def _finish(self, node_id: str, port: NodePort) -> None:
        version, limit_s = self._snapshot.version, self._config.stage_timeout_s
        call = port.finish(version, self._snapshot.manifest)
        what = f"verification of version {version}"
        path = await self._attempt(node_id, call, what, limit_s, "stage_timeout_s")
        if path is not None:
            self._outcomes[node_id] = NodeOutcome(path=path)

    async def _attempt(
        self, node_id: str, call: Awaitable[_T], what: str, limit_s: float, setting: str
    ) -> _T | None:
        """One call to one node; if it fails, the node is left behind."""
        try:
            async with asyncio.timeout(limit_s):
                return await call
        except TimeoutError:
            error = f"no answer for {what} within weights.{setting} {limit_s:g}"
        except SlipstreamError as exc:
            error = exc.message
        await self._fail(node_id, error)
        return None

    async def _fail(self, node_id: str, error: str) -> None:
        version = self._snapshot.version
        self._outcomes[node_id] = NodeOutcome(error=error)
        logger.warning("weights: version %d does not reach node %s: %s", version, node_id, error)
        await self._remove(node_id)

    async def _remove(self, node_id: str) -> None:
        port = self._ports.get(node_id)
        if port is not None:
            await try_remove(port, node_id, self._snapshot.version, self._config)


async def try_remove(port: NodePort, node_id: str, version: int, config: WeightsConfig) -> None:
    """Remove a copy, in at most ``weights.bucket_timeout_s``. Never raises: leftovers are swept."""
    try:
        async with asyncio.timeout(config.bucket_timeout_s):
            await port.remove(version)
    except (SlipstreamError, TimeoutError) as exc:
        logger.warning("weights: version %d stays on node %s: %s", version, node_id, exc)


def _size_of(path: str) -> int:
    descriptor = open_regular_file(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _read_at(path: str, offset: int, data: Bytes) -> None:
    """Fill ``data``. Opens the file anew, so that a thread whose caller was cancelled never reads
    from a descriptor that means another file by now."""
    descriptor = open_regular_file(path)
    try:
        position = 0
        while position < len(data):
            num_read = os.preadv(descriptor, [data[position:].data], offset + position)
            if not num_read:
                raise WeightTransferError(
                    f"weight segment {Path(path).name} ends at byte {offset + position}: it became "
                    "shorter after it was verified"
                )
            position += num_read
    except OSError as exc:
        raise WeightTransferError(f"weight segment {path} cannot be read: {exc.strerror}") from exc
    finally:
        os.close(descriptor)
