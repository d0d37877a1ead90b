"""What an engine needs of a node, and which node it is sent to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.placement import (
    NODE_ID_LABEL,
    EngineNeeds,
    NodeView,
    PlacedEngine,
    choose_node,
    engine_needs,
    matches,
)
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.pool_types import PlacementStrategy

PACK, SPREAD = PlacementStrategy.PACK, PlacementStrategy.SPREAD


def spec(device: str = "cuda", **engine: object) -> EngineSpec:
    return EngineSpec(
        engine_id="engine-0",
        index=0,
        model=ModelConfig(path="/models/policy"),
        engine=EngineConfig.model_validate(engine),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(),
        device=device,
        pool="a",
    )


def node(name: str, labels: Mapping[str, str] | None = None, **resources: float) -> NodeView:
    return NodeView(node_id=name, is_alive=True, resources=resources, labels=labels or {})


def needs(
    strategy: PlacementStrategy = PACK, labels: dict[str, str] | None = None, **resources: float
) -> EngineNeeds:
    return EngineNeeds(resources=resources, labels=labels or {}, strategy=strategy)


def placed(node_id: str, pool: str = "a", **resources: float) -> PlacedEngine:
    return PlacedEngine(pool=pool, node_id=node_id, resources=resources)


def test_an_engine_reserves_a_gpu_for_each_rank_in_one_piece() -> None:
    assert engine_needs(spec(tensor_parallel_size=4, num_cpus=2)).resources == {"GPU": 4, "CPU": 2}
    assert engine_needs(spec(num_gpus=0.5)).resources == {"GPU": 0.5}
    assert engine_needs(spec("cpu", tensor_parallel_size=2)).resources == {}


def test_custom_resources_labels_and_nodes_are_asked_for() -> None:
    wanted = engine_needs(
        spec(
            "cpu",
            placement={
                "resources": {"rack-7": 0.5},
                "node_labels": {"gpu-type": "!t4"},
                "node_ids": ["ab", "cd"],
                "strategy": "spread",
            },
        )
    )
    assert wanted == needs(
        SPREAD, {"gpu-type": "!t4", NODE_ID_LABEL: "in(ab,cd)"}, **{"rack-7": 0.5}
    )
    assert wanted.describe() == "0.5 rack-7, gpu-type=!t4, ray.io/node-id=in(ab,cd)"


def test_pack_goes_where_most_of_the_pool_are_while_there_is_room() -> None:
    nodes = [node("n1", GPU=4), node("n2", GPU=4)]
    there = [placed("n2", GPU=1)]
    assert choose_node(nodes, needs(GPU=1), "a", there, "n1") == "n2"
    full = [placed("n2", GPU=1) for _ in range(4)]
    assert choose_node(nodes, needs(GPU=1), "a", full, "n9") == "n1"


def test_spread_goes_where_the_fewest_of_the_pool_are() -> None:
    nodes = [node("n1", GPU=4), node("n2", GPU=4)]
    there = [placed("n1", GPU=1), placed("n2", "another", GPU=1), placed("n2", "another", GPU=1)]
    assert choose_node(nodes, needs(SPREAD, GPU=1), "a", there, "n1") == "n2"


def test_engines_of_other_pools_take_room_too() -> None:
    nodes = [node("n1", GPU=1), node("n2", GPU=1)]
    assert choose_node(nodes, needs(GPU=1), "a", [placed("n1", "b", GPU=1)], "n1") == "n2"


@pytest.mark.parametrize("strategy", [PACK, SPREAD])
def test_among_equals_the_servers_node_is_first(strategy: PlacementStrategy) -> None:
    nodes = [node("n1"), node("n2"), node("n3")]
    assert choose_node(nodes, needs(strategy), "a", [], "n2") == "n2"


def test_an_engine_that_fits_nowhere_waits() -> None:
    dead = NodeView(node_id="n3", is_alive=False, resources={"GPU": 8}, labels={})
    nodes = [node("n1", GPU=2), node("n2", GPU=2), dead]
    assert choose_node(nodes, needs(GPU=4), "a", [], "n1") is None, "ranks stay on one node"
    assert choose_node(nodes, needs(GPU=2), "a", [placed("n2", GPU=1)], "n2") == "n1"


def test_nodes_that_are_about_to_go_get_no_engine() -> None:
    going = replace(node("n1", GPU=4), is_draining=True)
    assert choose_node([going, node("n2", GPU=4)], needs(GPU=4), "a", [], "n1") == "n2"
    assert choose_node([going], needs(GPU=4), "a", [], "n1") is None


def test_fractions_that_add_up_to_what_there_is_fit() -> None:
    # 0.3 - 0.2 is a little less than 0.1 in binary.
    two = [placed("n1", fast=0.1) for _ in range(2)]
    assert choose_node([node("n1", fast=0.3)], needs(fast=0.1), "a", two, "n1") == "n1"
    three = [*two, placed("n1", fast=0.1)]
    assert choose_node([node("n1", fast=0.3)], needs(fast=0.1), "a", three, "n1") is None


def test_only_nodes_with_the_labels_are_taken() -> None:
    nodes = [node("n1", {"zone": "x"}), node("n2", {"zone": "y"}), node("n3")]
    assert choose_node(nodes, needs(labels={"zone": "y"}), "a", [], "n1") == "n2"
    by_id = needs(labels={NODE_ID_LABEL: "in(n3,n4)"})
    assert choose_node(nodes, by_id, "a", [], "n1") == "n3"


@pytest.mark.parametrize(
    ("selector", "value", "is_match"),
    [
        ("x", "x", True),
        ("x", "y", False),
        ("x", None, False),
        ("!x", "y", True),
        ("!x", "x", False),
        ("!x", None, True),
        ("in(x, y)", "y", True),
        ("in(x,y)", "z", False),
        ("!in(x,y)", "z", True),
        ("!in(x,y)", "x", False),
    ],
)
def test_selectors_mean_what_ray_means_by_them(
    selector: str, value: str | None, is_match: bool
) -> None:
    labels = {} if value is None else {"zone": value}
    assert matches(labels, {"zone": selector}) is is_match
