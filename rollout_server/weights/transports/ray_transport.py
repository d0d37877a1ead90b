"""The transport ``ray`` on the server's side: its actors, and buckets in the object store.

One actor on the server's own node takes segments from trainers (``SegmentReceiver``); one on every
other node that has engines keeps copies there (``NodeCopies``). They end with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollout_server.weights.transports.node_copies import NodeCopies
from rollout_server.weights.transports.node_files import NodeFiles
from rollout_server.weights.transports.receiver import SegmentReceiver
from rollout_server.weights.transports.snapshot_files import SharedFiles, SnapshotFiles
from rollout_server.weights.transports.spread import Bytes
from shared.config.weights import WeightsConfig
from shared.errors import ConfigurationError, SlipstreamError, WeightTransferError
from shared.schemas.weights import WeightManifest
from shared.types import TransportKind

logger = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 5.0
MIB = 1 << 20


async def start_snapshot_files(config: WeightsConfig) -> SnapshotFiles:
    """What the configured transport needs on the cluster that this process has joined.

    Raises:
        ConfigurationError: the object store is too small for two buckets.
        WeightTransferError: the receiver does not start.
    """
    if not config.spans_nodes:
        return SharedFiles(config.spares_dir)
    nodes = RayNodes(config)
    if config.transport is TransportKind.NCCL:
        # Imported here: it is built on this module.
        from rollout_server.weights.transports.collective_transport import CollectiveNodes

        nodes = CollectiveNodes(config)
    return NodeFiles(nodes, config, await nodes.start_receiver())


class _ReceiverGoneError(WeightTransferError):
    """The actor on a node has ended, with or without its node."""


class ReceiverActor(SegmentReceiver):
    """With a clock of its own, since nobody calls on behalf of a trainer that died."""

    def __init__(self, directory: str, *, idle_limit_s: float, kept_limit_s: float) -> None:
        super().__init__(directory, idle_limit_s=idle_limit_s, kept_limit_s=kept_limit_s)
        threading.Thread(target=self._expire_forever, name="expiry", daemon=True).start()

    def ready(self) -> None:
        """Answers when it can be called."""

    def _expire_forever(self) -> None:
        while True:
            time.sleep(EXPIRY_INTERVAL_S)
            self.expire()


class RayNodes:
    """Implements ``spread.ClusterNodes``."""

    receiver_class: type = ReceiverActor
    receiver_threads = 1

    def __init__(self, config: WeightsConfig) -> None:
        context = ray.get_runtime_context()
        self.own_node_id: str = context.get_node_id()
        self._namespace: str = context.namespace
        self._config = config
        self._receiver: Any = None
        self._copies: dict[str, Any] = {}
        """Actors by node."""
        self._gone: set[str] = set()
        """Nodes whose actor ended without having been asked to."""

    async def start_receiver(self) -> str:
        """Returns its name, as ``WeightsResponse.receiver`` has it.

        Raises:
            ConfigurationError, WeightTransferError: see ``start_snapshot_files``.
        """
        config = self._config
        problem = _store_problem(await asyncio.to_thread(ray.nodes), self.own_node_id, config)
        if problem is not None:
            raise ConfigurationError(problem, param="weights.bucket_mib")
        self._receiver, name = await self._start_receiver_on(self.own_node_id)
        return name

    async def _start_receiver_on(self, node_id: str) -> tuple[Any, str]:
        config = self._config
        name = f"weights-receiver-{uuid.uuid4().hex[:12]}"
        placed = _placed_on(node_id) | {"max_concurrency": self.receiver_threads}
        receiver = (
            ray.remote(self.receiver_class)
            .options(name=name, max_restarts=-1, **placed)
            .remote(
                config.shared_memory_dir,
                idle_limit_s=config.transfer_timeout_s,
                kept_limit_s=config.segment_kept_s,
            )
        )
        try:
            async with asyncio.timeout(config.stage_timeout_s):
                await _awaited(receiver.ready.remote())
        except (TimeoutError, RayError) as exc:
            ray.kill(receiver, no_restart=True)
            raise WeightTransferError(
                f"the receiver of weight segments did not start within weights.stage_timeout_s "
                f"{config.stage_timeout_s:g}: {exc}"
            ) from exc
        return receiver, f"{self._namespace}/{name}"

    async def welcome(self, node_id: str) -> None:
        """Nobody broadcasts."""

    def receiver_on(self, node_id: str) -> str | None:
        return None

    async def delivered(self, node_id: str, segment: str) -> str | None:
        return None

    async def port(self, node_id: str) -> RayPort:
        return RayPort(self, node_id, await self.actor(node_id))

    async def actor(self, node_id: str) -> Any:
        """What keeps the copies on a node; started on the first call, and again when it is gone.

        Raises:
            WeightTransferError: the node's object store is too small.
        """
        if node_id not in self._copies:
            problem = _store_problem(await asyncio.to_thread(ray.nodes), node_id, self._config)
            if problem is not None:
                raise WeightTransferError(problem, param="weights.bucket_mib")
            self._gone.discard(node_id)
            self._copies[node_id] = (
                ray.remote(NodeCopies)
                .options(max_restarts=0, **_placed_on(node_id))
                .remote(self._config.shared_memory_dir)
            )
        return self._copies[node_id]

    async def put(self, data: Bytes) -> object:
        try:
            return await asyncio.to_thread(ray.put, data)
        except RayError as exc:
            raise WeightTransferError(
                f"a bucket of {data.nbytes} bytes does not get into Ray's object store (see "
                f"weights.bucket_mib {self._config.bucket_mib}, ray.object_store_mib): {exc}"
            ) from exc

    async def is_lost(self, node_id: str) -> bool:
        if node_id not in self._gone:
            nodes = await asyncio.to_thread(ray.nodes)
            return not any(node["NodeID"] == node_id and node["Alive"] for node in nodes)
        # Ray knows of an actor's end at once, and of its node's only after some heartbeats. Where
        # another actor can be started, only the first one had ended.
        try:
            async with asyncio.timeout(self._config.stage_timeout_s):
                await (await self.port(node_id)).holds(0)
        except (SlipstreamError, TimeoutError) as exc:
            logger.warning("weights: node %s is lost: %s", node_id, exc)
            return True
        return False

    def forget_port(self, node_id: str) -> None:
        """Its actor is gone: the next call starts another."""
        self._copies.pop(node_id, None)
        self._gone.add(node_id)

    async def close(self) -> None:
        actors = [*self._copies.values()] + ([self._receiver] if self._receiver else [])
        self._copies.clear()
        self._receiver = None
        await asyncio.gather(*(self._end(actor) for actor in actors))

    async def _end(self, actor: Any) -> None:
        with contextlib.suppress(RayError, TimeoutError):  # what it leaves is swept
            async with asyncio.timeout(self._config.bucket_timeout_s):
                await _awaited(actor.close.remote())
        ray.kill(actor, no_restart=True)


class RayPort:
    """Implements ``spread.NodePort`` over one actor."""

    def __init__(self, nodes: RayNodes, node_id: str, actor: Any) -> None:
        self._nodes = nodes
        self._node_id = node_id
        self._actor = actor

    async def begin(self, version: int, num_bytes: int) -> None:
        try:
            await self._call(self._actor.begin.remote(version, num_bytes))
        except _ReceiverGoneError:  # it may have been killed since the last push; its node lives
            self._actor = await self._nodes.actor(self._node_id)
            await self._call(self._actor.begin.remote(version, num_bytes))

    async def append(self, version: int, offset: int, bucket: object) -> None:
        await self._call(self._actor.append.remote(version, offset, bucket))

    async def finish(self, version: int, manifest: WeightManifest) -> str:
        path: str = await self._call(self._actor.finish.remote(version, manifest))
        return path

    async def adopt(self, version: int, source: str, manifest: WeightManifest) -> str:
        path: str = await self._call(self._actor.adopt.remote(version, source, manifest))
        return path

    async def holds(self, version: int) -> bool:
        return bool(await self._call(self._actor.holds.remote(version)))

    async def remove(self, version: int) -> None:
        await self._call(self._actor.remove.remote(version))

    async def _call(self, reference: Any) -> Any:
        try:
            return await _awaited(reference)
        except RayTaskError as exc:
            if isinstance(exc.cause, SlipstreamError):
                raise exc.cause from exc
            raise WeightTransferError(f"node {self._node_id} failed: {exc}") from exc
        except (RayActorError, ActorUnschedulableError) as exc:
            self._nodes.forget_port(self._node_id)
            raise _ReceiverGoneError(f"the receiver on node {self._node_id} is gone") from exc
        except RayError as exc:
            raise WeightTransferError(f"node {self._node_id} cannot be reached: {exc}") from exc


def _placed_on(node_id: str) -> dict[str, Any]:
    strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    # It writes and waits: a core of its own would be one less for an engine.
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def _store_problem(nodes: list[dict[str, Any]], node_id: str, config: WeightsConfig) -> str | None:
    """Why two buckets do not fit into the object store of a node, if they do not."""
    for node in nodes:
        store_bytes = int(node["Resources"].get("object_store_memory", 0))
        if node["NodeID"] == node_id and node["Alive"] and store_bytes < 4 * config.piece_bytes:
            return (
                f"the object store of node {node_id} has {store_bytes // MIB} MiB, two buckets of "
                f"weights.bucket_mib {config.bucket_mib} do not fit: make it larger (ray start "
                "--object-store-memory, ray.object_store_mib) or the buckets smaller"
            )
    return None


async def _awaited(reference: Any) -> Any:
    return await reference
