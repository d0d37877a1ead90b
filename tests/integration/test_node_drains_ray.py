"""A node of a real Ray cluster is announced to go; vLLM is not started."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from rollout_server.engine.cluster import draining_nodes
from tests.integration.test_placement_ray import STORE_BYTES, Placed, spec, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DEADLINE_S = 600


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        for num_cpus in (0, 4, 4):
            cluster.add_node(
                num_cpus=num_cpus, object_store_memory=STORE_BYTES, include_dashboard=False
            )
        ray.init(address=cluster.address, namespace="slipstream", log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def announce(cluster: Cluster, node_id: str, deadline_s: float) -> None:
    """As a cloud's notice of preemption reaches Ray, or ``ray drain-node``."""
    accepted, reason = GcsClient(address=cluster.address).drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the cloud takes it back",
        int(deadline_s * 1000),
    )
    assert accepted, reason


async def test_a_node_that_is_about_to_go_is_known_with_its_time_and_gets_no_engine(
    cluster: Cluster,
) -> None:
    assert draining_nodes() == {}
    placed = Placed()
    try:
        # Something is reserved there, or Ray ends the node as soon as it drains.
        going = await placed.place(spec(0, num_cpus=1))
        goes_at_s = time.time() + DEADLINE_S
        announce(cluster, going, goes_at_s)
        await until(lambda: draining_nodes() != {}, "Ray to tell")
        (told,) = draining_nodes().items()
        assert told[0] == going
        assert told[1] == pytest.approx(goes_at_s, abs=0.01)
        elsewhere = {await placed.place(spec(number, num_cpus=1)) for number in (1, 2)}
        assert len(elsewhere) == 1
        assert going not in elsewhere
    finally:
        placed.remove()


async def test_a_deadline_that_is_not_known_is_none(cluster: Cluster) -> None:
    placed = Placed()
    try:
        going = await placed.place(spec(0, num_cpus=1))
        announce(cluster, going, 0)
        await until(lambda: draining_nodes() == {going: None}, "Ray to tell")
    finally:
        placed.remove()
