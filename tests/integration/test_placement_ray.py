"""Engines' actors on real Ray nodes: groups, labels, spreading, names. vLLM is not started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.ray_engines import RayEngines
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.config.weights import WeightsConfig
from shared.errors import ConfigurationError, EngineError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NODES = {
    "head": {"num_cpus": 0},
    "left": {"num_cpus": 4, "labels": {"zone": "left"}},
    "right": {"num_cpus": 4, "labels": {"zone": "right"}, "resources": {"fast": 1}},
}
STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Ids by name."""
    cluster = Cluster()
    try:
        for options in NODES.values():
            cluster.add_node(object_store_memory=STORE_BYTES, include_dashboard=False, **options)
        ray.init(address=cluster.address, namespace="slipstream", log_to_driver=False)
        cluster.wait_for_nodes()
        ids = {}
        for node in ray.nodes():
            zone = (node.get("Labels") or {}).get("zone", "head")
            ids[zone] = node["NodeID"]
        yield ids
    finally:
        ray.shutdown()
        cluster.shutdown()


def spec(number: int = 0, **engine: Any) -> EngineSpec:
    return EngineSpec(
        engine_id=f"engine-{number}",
        index=0,
        model=ModelConfig(path="/models/policy"),
        engine=EngineConfig.model_validate({"placement_timeout_s": 60.0, **engine}),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(),
        device="cpu",
    )


class Placed:
    """Engines' actors, removed at the end."""

    def __init__(self) -> None:
        self.engines = RayEngines("test", WeightsConfig())
        self.hosts: list[Any] = []

    async def place(self, one: EngineSpec, engines: RayEngines | None = None) -> str:
        """The node its actor runs on."""
        host = (engines or self.engines)(one).host
        self.hosts.append(host)
        actor = await host.create()
        where: Any = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        return str(await where)

    def remove(self) -> None:
        for host in self.hosts:
            host.remove()
        self.hosts.clear()


@pytest.fixture
async def placed(nodes: dict[str, str]) -> Any:
    placed = Placed()
    yield placed
    placed.remove()
    await until(lambda: groups() == [], "the placement groups to go")


def groups() -> list[dict[str, Any]]:
    """Those that are not removed."""
    table = placement_group_table().values()
    return [group for group in table if group["state"] != "REMOVED"]


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited 30 s for {what}")


async def test_an_engine_has_a_placement_group_of_its_own_on_one_node(
    placed: Placed, nodes: dict[str, str]
) -> None:
    node_id = await placed.place(spec(num_cpus=3))
    assert node_id in (nodes["left"], nodes["right"])
    (group,) = groups()
    assert group["strategy"] == "STRICT_PACK"
    assert list(group["bundles"].values()) == [{"CPU": 3.0}]
    assert set(group["bundles_to_node_id"].values()) == {node_id}


async def test_spread_engines_go_to_different_nodes_and_packed_ones_to_one(
    placed: Placed, nodes: dict[str, str]
) -> None:
    spread = [spec(n, num_cpus=1, placement={"strategy": "spread"}) for n in range(4)]
    where = await asyncio.gather(*(placed.place(one) for one in spread))
    assert sorted(where) == sorted([nodes["left"], nodes["right"]] * 2), "also at one time"
    placed.remove()
    await until(lambda: groups() == [], "the placement groups to go")
    packed = await asyncio.gather(*(placed.place(spec(n, num_cpus=1)) for n in range(4)))
    assert len(set(packed)) == 1


async def test_an_engine_that_reserves_nothing_goes_beside_the_server_or_where_it_is_told(
    placed: Placed, nodes: dict[str, str]
) -> None:
    own = ray.get_runtime_context().get_node_id()
    assert await placed.place(spec(0)) == own
    labelled = spec(1, placement={"node_labels": {"zone": "in(right)"}})
    assert await placed.place(labelled) == nodes["right"]
    assert groups() == []


async def test_labels_ids_and_custom_resources_decide(
    placed: Placed, nodes: dict[str, str]
) -> None:
    for number, placement in enumerate(
        (
            {"node_labels": {"zone": "!left"}},
            {"node_ids": [nodes["right"]]},
            {"resources": {"fast": 0.5}},
        )
    ):
        where = await placed.place(spec(number, num_cpus=1, placement=placement))
        assert where == nodes["right"], placement


async def test_two_servers_with_runs_of_one_name_share_a_cluster(placed: Placed) -> None:
    other = RayEngines("test", WeightsConfig())
    await placed.place(spec(0))
    await placed.place(spec(0), other)
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert len([name for name in names if name.endswith("-engine-0")]) == 2


async def test_what_fits_nowhere_says_so_and_takes_nothing(placed: Placed) -> None:
    with pytest.raises(EngineError, match=r"5 CPU.*0\.5 s \(engine\.placement_timeout_s\)"):
        await placed.place(spec(num_cpus=5, placement_timeout_s=0.5))


async def test_a_label_that_ray_does_not_take_is_a_wrong_setting(placed: Placed) -> None:
    wrong = spec(num_cpus=1, placement={"node_labels": {"zone": "not a label!"}})
    with pytest.raises(ConfigurationError, match="zone=not a label!"):
        await placed.place(wrong)


async def test_an_engine_waits_for_room_that_another_gives_back(
    placed: Placed, nodes: dict[str, str]
) -> None:
    right = {"node_labels": {"zone": "right"}}
    await placed.place(spec(0, num_cpus=4, placement=right))
    waiting = asyncio.create_task(placed.place(spec(1, num_cpus=4, placement=right)))
    await until(lambda: len(groups()) == 2, "the second to ask")
    assert not waiting.done()
    placed.hosts[0].remove()
    assert await waiting == nodes["right"]
