"""What an engine needs of a node, and which node it should go to. Pure; ``cluster.py`` asks Ray.

An engine is one Ray actor, and the ranks of its tensor parallelism are processes of that actor. Ray
gives an actor what one bundle of its placement group has, and a bundle never spans nodes: so one
bundle holds all CPUs and GPUs of an engine, and they are together on one node or nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout_server.engine.arguments import EngineSpec
from shared.pool_types import PlacementStrategy

NODE_ID_LABEL = "ray.io/node-id"
"""Ray 2.60 gives every node this label."""
RESOLUTION = 1e-4
"""Smallest amount of a resource that Ray tells apart."""
SELECTOR = re.compile(r"^(?P<negated>!?)(?:in\((?P<several>.*)\)|(?P<one>.*))$")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineNeeds:
    """Of one engine."""

    resources: dict[str, float]
    """What Ray reserves; empty reserves nothing."""
    labels: dict[str, str]
    """Selectors a node's labels must match, in Ray's notation."""
    strategy: PlacementStrategy

    def describe(self) -> str:
        """For messages."""
        parts = [f"{amount:g} {name}" for name, amount in sorted(self.resources.items())]
        parts += [f"{name}={value}" for name, value in sorted(self.labels.items())]
        return ", ".join(parts) or "nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeView:
    """A node of the cluster, as Ray reports it."""

    node_id: str
    is_alive: bool
    resources: Mapping[str, float]
    """All there are, taken or not."""
    labels: Mapping[str, str]
    is_draining: bool = False
    """About to go: Ray places nothing there any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedEngine:
    """An engine of this server that has a node already, or is on its way to one."""

    pool: str
    node_id: str
    resources: Mapping[str, float]


def engine_needs(spec: EngineSpec) -> EngineNeeds:
    """From the settings of the engine's pool."""
    engine, placement = spec.engine, spec.engine.placement
    num_gpus = engine.num_gpus
    if num_gpus is None:
        num_gpus = float(engine.tensor_parallel_size) if spec.device == "cuda" else 0.0
    wanted = {"CPU": engine.num_cpus, "GPU": num_gpus, **placement.resources}
    labels = dict(placement.node_labels)
    if placement.node_ids:
        labels[NODE_ID_LABEL] = f"in({','.join(placement.node_ids)})"
    return EngineNeeds(
        resources={name: amount for name, amount in wanted.items() if amount > 0},
        labels=labels,
        strategy=placement.strategy,
    )


def choose_node(
    nodes: Sequence[NodeView],
    needs: EngineNeeds,
    pool: str,
    placed: Sequence[PlacedEngine],
    own_node_id: str,
) -> str | None:
    """The node an engine should go to; None when no node of today has room.

    Only what this server's engines hold counts as taken. What others hold Ray knows, and puts the
    engine elsewhere: the choice is a wish.

    Args:
        placed: engines of all pools.
        own_node_id: the server's node, preferred among equals.
    """
    fitting = [node for node in nodes if _has_room(node, needs, placed)]
    if not fitting:
        return None
    num_here = {
        node.node_id: sum(e.pool == pool and e.node_id == node.node_id for e in placed)
        for node in fitting
    }
    sign = 1 if needs.strategy is PlacementStrategy.SPREAD else -1
    best = min(
        fitting,
        key=lambda node: (
            sign * num_here[node.node_id],
            node.node_id != own_node_id,
            node.node_id,
        ),
    )
    return best.node_id


def matches(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy all selectors, as Ray evaluates them."""
    for name, selector in selectors.items():
        found = SELECTOR.fullmatch(selector)
        assert found is not None, "the pattern takes everything"
        several = found["several"]
        allowed = [found["one"]] if several is None else [v.strip() for v in several.split(",")]
        if (labels.get(name) in allowed) == bool(found["negated"]):
            return False
    return True


def _has_room(node: NodeView, needs: EngineNeeds, placed: Sequence[PlacedEngine]) -> bool:
    if not node.is_alive or node.is_draining:
        return False
    if not matches({NODE_ID_LABEL: node.node_id, **node.labels}, needs.labels):
        return False
    for name, amount in needs.resources.items():
        taken = sum(e.resources.get(name, 0.0) for e in placed if e.node_id == node.node_id)
        if node.resources.get(name, 0.0) - taken < amount - RESOLUTION:
            return False
    return True
