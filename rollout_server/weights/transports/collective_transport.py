"""The transport ``nccl`` on the server's side: a receiver on every node with engines.

They take part in the trainer's broadcast, each writing a file on its node. Whatever a broadcast has
not brought to a node (late joiners, a node that was left out, a restart) the server brings, as
under the transport ``ray``, whose actors these are built on.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from ray.exceptions import RayError

from rollout_server.weights.transports.broadcast_receiver import BroadcastReceiver
from rollout_server.weights.transports.ray_transport import RayNodes, ReceiverActor
from shared.config.weights import WeightsConfig
from shared.errors import WeightTransferError


class BroadcastActor(ReceiverActor, BroadcastReceiver):
    """Is started again by Ray when it is killed, as long as its node lives."""

    def __init__(self, directory: str, *, idle_limit_s: float, kept_limit_s: float) -> None:
        super().__init__(directory, idle_limit_s=idle_limit_s, kept_limit_s=kept_limit_s)
        # Importing torch takes seconds, for which the first push should not have to wait.
        threading.Thread(target=self.gpus, name="import-torch", daemon=True).start()


class CollectiveNodes(RayNodes):
    """Also keeps the receivers of other nodes."""

    receiver_class = BroadcastActor
    receiver_threads = 8
    """A broadcast holds one for as long as ``weights.transfer_timeout_s`` if its trainer hangs."""

    def __init__(self, config: WeightsConfig) -> None:
        super().__init__(config)
        self._others: dict[str, tuple[Any, str]] = {}
        """Receivers and their names, by node."""
        self._starting: dict[str, asyncio.Lock] = {}

    async def welcome(self, node_id: str) -> None:
        # Engines of one node come up at the same time.
        async with self._starting.setdefault(node_id, asyncio.Lock()):
            if node_id not in self._others:
                self._others[node_id] = await self._start_receiver_on(node_id)

    def receiver_on(self, node_id: str) -> str | None:
        receiver = self._others.get(node_id)
        return None if receiver is None else receiver[1]

    async def delivered(self, node_id: str, segment: str) -> str | None:
        receiver = self._others.get(node_id)
        if receiver is None:
            return None
        try:
            async with asyncio.timeout(self._config.bucket_timeout_s):
                return await _awaited(receiver[0].delivered.remote(segment))
        except (TimeoutError, RayError) as exc:
            raise WeightTransferError(f"the receiver on node {node_id} is gone: {exc}") from exc

    async def close(self) -> None:
        others = [actor for actor, _ in self._others.values()]
        self._others.clear()
        await asyncio.gather(super().close(), *(self._end(actor) for actor in others))


async def _awaited(reference: Any) -> Any:
    return await reference
