"""A Ray cluster of several nodes on this machine, whose nodes can be killed.

Leans on ``ray.cluster_utils.Cluster`` (Ray 2.60.0): ``all_processes`` of a node names its raylet.
"""

from __future__ import annotations

from typing import Any

from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Ray's own, so that it takes two seconds and not half a minute to find a node dead."""


class ClusterNodes:
    """A head that takes no engine, and workers with room for so many engines each."""

    def __init__(self, *room: int) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
                "_system_config": HEALTH_CHECKS,
            },
        )
        for num_engines in room:
            self.add(num_engines)

    def settings(self) -> dict[str, Any]:
        """Of a server whose engines are placed on these nodes, apart from each other."""
        return {
            "ray": {"address": self._cluster.address},
            "engine": {"num_cpus": 1, "placement": {"strategy": "spread"}},
        }

    @property
    def room(self) -> dict[str, int]:
        """By node id, of those workers that live."""
        return {node.node_id: node._ray_params.num_cpus for node in self._cluster.worker_nodes}

    def add(self, num_engines: int) -> None:
        """Another worker."""
        self._cluster.add_node(num_cpus=num_engines, object_store_memory=STORE_BYTES)

    def kill_raylet(self, node_id: str) -> None:
        """Nothing else of the node: it is Ray's to find out and to clean up."""
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        node.all_processes["raylet"][0].process.kill()

    def kill_head(self) -> None:
        """Of the head, the process that keeps the cluster's tables (GCS)."""
        self._cluster.head_node.kill_gcs_server()

    def restart_head(self) -> None:
        """With what a Redis has kept of its tables (``RAY_REDIS_ADDRESS``)."""
        self._cluster.head_node.start_gcs_server()

    def shutdown(self) -> None:
        self._cluster.shutdown()
