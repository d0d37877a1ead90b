"""A Ray cluster of two nodes on this host, and how much memory their object stores have taken."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from rollout_server.engine.cluster import FREE_OBJECTS_AT_ONCE

NAMESPACE = "slipstream"
SAMPLE_INTERVAL_S = 0.002


class TwoNodes:
    """The first is the one this process is connected to. ``lose_second`` kills the other."""

    def __init__(self, cluster: Cluster, num_cpus: int, store_bytes: int) -> None:
        self._cluster = cluster
        self._num_cpus = num_cpus
        self._store_bytes = store_bytes
        self.second: Any = None
        self.add_second()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def first_id(self) -> str:
        return str(self._cluster.head_node.node_id)

    @property
    def second_id(self) -> str:
        return str(self.second.node_id)

    def add_second(self) -> None:
        self.second = self._cluster.add_node(
            num_cpus=self._num_cpus,
            object_store_memory=self._store_bytes,
            resources={"second": 100},
        )

    def lose_second(self) -> None:
        """As if it had been switched off."""
        self._cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def store_bytes(self) -> dict[str, int]:
        """Pages that each node's object store has ever touched: they are never given back."""
        nodes = {self.first_id: self._cluster.head_node, self.second_id: self.second}
        return {node_id: _touched_bytes(_raylet_pid(node)) for node_id, node in nodes.items()}


@contextlib.contextmanager
def two_nodes(
    store_bytes: int, *, first_num_cpus: int = 1, second_num_cpus: int = 1
) -> Iterator[TwoNodes]:
    """Started for the caller, who is connected to the first as a server is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(*FREE_OBJECTS_AT_ONCE)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": first_num_cpus,
            "object_store_memory": store_bytes,
            "include_dashboard": False,
        },
    )
    try:
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=True)
        yield TwoNodes(cluster, second_num_cpus, store_bytes)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _raylet_pid(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def _touched_bytes(raylet_pid: int) -> int:
    """Of the object store's files, which have no names any more."""
    found: dict[int, int] = {}
    for descriptor in Path(f"/proc/{raylet_pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "plasma" in os.readlink(descriptor):
                facts = descriptor.stat()
                found[facts.st_ino] = facts.st_blocks * 512
    return sum(found.values())


class PeakMemory:
    """The most private memory a process has while the block runs, above what it began with."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.extra_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._before = self._private_bytes()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):  # it may have ended
                self.extra_bytes = max(self.extra_bytes, self._private_bytes() - self._before)
            time.sleep(SAMPLE_INTERVAL_S)

    def _private_bytes(self) -> int:
        (line,) = (
            line for line in self._status.read_text().splitlines() if line.startswith("RssAnon")
        )
        return int(line.split()[1]) * 1024
