"""``SnapshotFiles`` over several machines: which node has which version, and which could not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.snapshot import CommittedSnapshot, remove_segment
from rollout_server.weights.transports.spread import ClusterNodes, Spread, try_remove
from shared.config.weights import WeightsConfig
from shared.errors import EngineDeadError, EngineError, SlipstreamError, WeightTransferError
from shared.types import EngineState

logger = logging.getLogger(__name__)


class NodeFiles:
    """One copy per node that has engines, however many. The coordinator's lock keeps callers of
    ``bring`` apart.

    Args:
        receiver: the actor that takes segments from trainers.
    """

    def __init__(self, nodes: ClusterNodes, config: WeightsConfig, receiver: str) -> None:
        self.receiver: str | None = receiver
        self._nodes = nodes
        self._config = config
        self._versions: dict[str, int] = {}
        """By the server's own path."""
        self._copies: dict[tuple[str, str], str] = {}
        """Path on a node, by the node and the server's own path."""
        self._errors: dict[tuple[str, str], str] = {}

    async def bring(self, snapshot: CommittedSnapshot, engines: Sequence[EngineHandle]) -> bool:
        """See ``SnapshotFiles``. The engines of a node that is gone are condemned."""
        path = snapshot.path
        self._versions[path] = snapshot.version
        node_ids = sorted({engine.node_id for engine in engines} - {self._nodes.own_node_id})
        has_copy = await asyncio.gather(*(self._has_copy(node, path) for node in node_ids))
        missing = [node for node, has in zip(node_ids, has_copy, strict=True) if not has]
        if not missing:
            return False
        arrived = await asyncio.gather(*(self._take_delivered(node, snapshot) for node in missing))
        missing = [node for node, has in zip(missing, arrived, strict=True) if not has]
        if not missing:
            return True
        outcomes = await Spread(self._nodes, snapshot, self._config).run(missing)
        for node_id, outcome in outcomes.items():
            if outcome.path is not None:
                self._copies[node_id, path] = outcome.path
                self._errors.pop((node_id, path), None)
                continue
            self._errors[node_id, path] = outcome.error
            if await self._nodes.is_lost(node_id):
                self._forget_node(node_id)
                for engine in engines:
                    if engine.node_id == node_id:
                        engine.condemn(f"its node {node_id} is gone: {outcome.error}")
        return True

    def path_for(self, engine: EngineHandle, path: str) -> str:
        """See ``SnapshotFiles``. A path that is no snapshot's is the same everywhere: the model
        directory."""
        if path not in self._versions or engine.node_id == self._nodes.own_node_id:
            return path
        copy = self._copies.get((engine.node_id, path))
        if copy is not None:
            return copy
        error = self._errors.get((engine.node_id, path), "it was not brought there")
        message = (
            f"engine {engine.engine_id}: version {self._versions[path]} is not on its node "
            f"{engine.node_id}: {error}"
        )
        raise EngineDeadError(message) if engine.state is EngineState.DEAD else EngineError(message)

    async def remove(self, path: str) -> None:
        """See ``SnapshotFiles``."""
        version = self._versions.pop(path, None)
        self._errors = {key: error for key, error in self._errors.items() if key[1] != path}
        holders = [node_id for node_id, own_path in self._copies if own_path == path]
        await asyncio.to_thread(remove_segment, path)
        if version is not None:
            await asyncio.gather(*(self._remove_from(node, path, version) for node in holders))

    async def retire(self, snapshot: CommittedSnapshot) -> None:
        """See ``SnapshotFiles``. Receivers write what comes next: nothing is left for them."""
        await self.remove(snapshot.path)

    async def close(self) -> None:
        """See ``SnapshotFiles``."""
        self._copies.clear()
        await self._nodes.close()

    def node_receivers(self, engines: Sequence[EngineHandle]) -> list[str]:
        """See ``SnapshotFiles``."""
        node_ids = sorted({engine.node_id for engine in engines} - {self._nodes.own_node_id})
        names = [self._nodes.receiver_on(node_id) for node_id in node_ids]
        return [name for name in names if name is not None]

    async def welcome(self, engine: EngineHandle) -> None:
        """See ``SnapshotFiles``."""
        if engine.node_id == self._nodes.own_node_id:
            return
        try:
            await self._nodes.welcome(engine.node_id)
        except WeightTransferError as exc:
            logger.warning("weights: no receiver on node %s: %s", engine.node_id, exc.message)

    async def _take_delivered(self, node_id: str, snapshot: CommittedSnapshot) -> bool:
        """Whether a trainer's broadcast has brought it there. If not, the server brings it."""
        limit_s = self._config.stage_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                source = await self._nodes.delivered(node_id, snapshot.manifest.segment)
                if source is None:
                    return False
                port = await self._nodes.port(node_id)
                path = await port.adopt(snapshot.version, source, snapshot.manifest)
        except TimeoutError:
            error = f"not verified within weights.stage_timeout_s {limit_s:g}"
        except SlipstreamError as exc:
            error = exc.message
        else:
            self._copies[node_id, snapshot.path] = path
            self._errors.pop((node_id, snapshot.path), None)
            return True
        logger.warning(
            "weights: what was broadcast of version %d to node %s is of no use, the server brings "
            "it: %s",
            snapshot.version,
            node_id,
            error,
        )
        return False

    async def _has_copy(self, node_id: str, path: str) -> bool:
        if (node_id, path) not in self._copies:
            return False
        try:
            async with asyncio.timeout(self._config.bucket_timeout_s):
                port = await self._nodes.port(node_id)
                return await port.holds(self._versions[path])
        except (SlipstreamError, TimeoutError) as exc:
            logger.warning("weights: node %s is asked for its copy: %s", node_id, exc)
            return False

    async def _remove_from(self, node_id: str, path: str, version: int) -> None:
        del self._copies[node_id, path]
        try:
            port = await self._nodes.port(node_id)
        except WeightTransferError as exc:
            logger.warning("weights: version %d stays on %s: %s", version, node_id, exc.message)
            return
        await try_remove(port, node_id, version, self._config)

    def _forget_node(self, node_id: str) -> None:
        self._copies = {key: path for key, path in self._copies.items() if key[0] != node_id}
