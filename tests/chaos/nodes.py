"""A Ray cluster of several nodes on this machine, whose nodes can be killed.

Leans on ``ray.cluster_utils.Cluster`` (Ray 2.60.0): ``all_processes`` of a node names its raylet.
"""

from __future__ import annotations

from pathlib import Path
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
    """A head that takes no engine, and workers with room for one each."""

    def __init__(self, num_workers: int) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
                "_system_config": HEALTH_CHECKS,
            },
        )
        for _ in range(num_workers):
            self._add()

    def settings(self) -> dict[str, Any]:
        """Of a server that places one engine on each node."""
        return {"address": self._cluster.address}

    def _add(self) -> None:
        self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def kill_raylet(self, node_id: str) -> None:
        """Kill a worker's raylet; another node joins in its place."""
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        node.all_processes["raylet"][0].process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self._add()

    def log_directory(self) -> Path:
        """Where Ray's processes write."""
        return Path(self._cluster.head_node.get_logs_dir_path())

    def shutdown(self) -> None:
        self._cluster.shutdown()
