"""Makes the handles of a server's engines, which know where on the cluster the others are."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.cluster import RayEngineHost, new_actor_prefix
from rollout_server.engine.handle import RayEngineHandle
from rollout_server.engine.placement import PlacedEngine
from shared.config.weights import WeightsConfig


class RayEngines:
    """Implements ``pooled_engine.CreateEngine``. One per server."""

    def __init__(self, run_name: str, weights: WeightsConfig) -> None:
        self._prefix = new_actor_prefix(run_name)
        self._weights = weights
        self._hosts: list[RayEngineHost] = []

    def __call__(self, spec: EngineSpec) -> RayEngineHandle:
        """A handle whose actor is created when it is started."""
        host = RayEngineHost(spec, f"{self._prefix}-{spec.engine_id}", self._placed)
        self._hosts.append(host)
        return RayEngineHandle(spec, host, self._weights)

    def _placed(self) -> Sequence[PlacedEngine]:
        self._hosts = [host for host in self._hosts if not host.is_removed]
        return [host.place for host in self._hosts if host.place is not None]
