"""Everything Ray: starting or joining the cluster, and turning ``EngineActor`` into a Ray actor."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec, engine_environment
from rollout_server.engine.placement import (
    NODE_ID_LABEL,
    EngineNeeds,
    NodeView,
    PlacedEngine,
    choose_node,
    engine_needs,
)
from shared.config.server import RayConfig
from shared.errors import ConfigurationError, EngineError, UnavailableError

MIB = 1024 * 1024
FREE_OBJECTS_AT_ONCE = ("RAY_free_objects_period_milliseconds", "0")
"""By default Ray 2.60 frees once a second what nobody refers to; by then many buckets of weights
would have taken new memory in the store, where two are enough. Read by each node at its start."""
RAY_ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Where Ray looks for the cluster that ``auto`` means."""
MAX_CONCURRENT_CALLS = 1024
"""Calls an engine actor runs at once; each sample group in flight is one."""
CHOSEN_NODE_TIMEOUT_S = 10.0
"""How long an engine waits for the node it was meant for, which others may have filled."""


def start_or_join_cluster(config: RayConfig) -> str:
    """Connect this process to Ray.

    Returns:
        Address under which the trainer can join the same cluster.

    Raises:
        ConfigurationError: ``RAY_ADDRESS`` leads to it through Ray Client (see ``RayConfig``).
        UnavailableError: the configured cluster cannot be reached.
    """
    named = os.environ.get(RAY_ADDRESS_VARIABLE, "")
    if config.address == "auto" and "://" in named:
        raise ConfigurationError(
            f"ray.address auto takes {RAY_ADDRESS_VARIABLE} {named!r}, which goes through Ray "
            "Client. Unset it, and make this machine a node of the cluster "
            "(ray start --address=HEAD:6379)",
            param="ray.address",
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {
        "namespace": "slipstream",
        "log_to_driver": True,
        "logging_level": logging.WARNING,
    }
    if config.address is None:
        os.environ.setdefault(*FREE_OBJECTS_AT_ONCE)
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": config.num_cpus or os.cpu_count(),
            "object_store_memory": config.object_store_mib * MIB,
        }
    else:
        options["address"] = config.address
    # ray.init puts a SIGTERM handler of its own in place, which ends the process without clean-up.
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(**options)
    except (ConnectionError, RuntimeError) as exc:
        raise UnavailableError(
            f"cannot connect to Ray (ray.address {config.address!r}): {exc}", param="ray.address"
        ) from exc
    finally:
        signal.signal(signal.SIGTERM, sigterm_handler)
    address: str = context.address_info["gcs_address"]
    return address


def leave_cluster() -> None:
    """Disconnect; a local cluster ends with it."""
    ray.shutdown()


def draining_nodes() -> dict[str, float | None]:
    """Nodes that Ray is about to lose, with the Unix time at which they go, None where it is not
    known. They live, and get nothing new.

    Ray 2.60 tells it by ``ray._private.state.state.get_draining_nodes`` only, which its own
    libraries use too (Ray Train for preempted nodes).

    Raises:
        UnavailableError: the cluster's head did not answer.
    """
    try:
        deadlines_ms = cluster_state.get_draining_nodes()
    except Exception as exc:  # a private call: what it raises while the head is away, nobody says
        raise UnavailableError(f"Ray does not tell which nodes drain: {exc!r}") from exc
    return {node_id: ms / 1000 if ms else None for node_id, ms in deadlines_ms.items()}


def new_actor_prefix(run_name: str) -> str:
    """What the names of a server's actors begin with. Names are unique on a cluster, and two
    servers may have runs of one name."""
    return f"{run_name}-{secrets.token_hex(4)}"


class RayEngineHost:
    """The actor of one engine, and the placement group it has for itself if it reserves anything.

    Args:
        actor_name: unique on the cluster; what Ray's own tools show.
        placed: the server's engines that have a node already.
    """

    def __init__(
        self, spec: EngineSpec, actor_name: str, placed: Callable[[], Sequence[PlacedEngine]]
    ) -> None:
        self._spec = spec
        self._needs = engine_needs(spec)
        self._actor_name = actor_name
        self._placed = placed
        self._chosen_node_id: str | None = None
        self._group: PlacementGroup | None = None
        self._actor: Any = None
        self.is_removed = False

    @property
    def place(self) -> PlacedEngine | None:
        """Where it goes; None while nothing is chosen."""
        if self._chosen_node_id is None or self.is_removed:
            return None
        return PlacedEngine(
            pool=self._spec.pool,
            node_id=self._chosen_node_id,
            resources=self._needs.resources,
        )

    async def create(self) -> Any:
        """Wait for room, then create the actor, which has not started vLLM yet.

        Raises:
            ConfigurationError: Ray refuses a label or a resource.
            EngineError: no node had room within ``engine.placement_timeout_s``.
        """
        nodes = await asyncio.to_thread(ray.nodes)
        draining = await asyncio.to_thread(draining_nodes)
        own_node_id = ray.get_runtime_context().get_node_id()
        # No await from the choice to its record: engines that start together see one another.
        views = [_node_view(node, draining) for node in nodes]
        self._chosen_node_id = choose_node(
            views, self._needs, self._spec.pool, self._placed(), own_node_id
        )
        try:
            if self._needs.resources:
                await self._reserve()
            self._actor = (
                ray.remote(EngineActor)
                .options(
                    name=self._actor_name,
                    max_concurrency=MAX_CONCURRENT_CALLS,
                    max_restarts=0,  # a replacement is a new engine with a new id
                    runtime_env={"env_vars": engine_environment(self._spec)},
                    **_actor_resources(self._needs, self._group, self._chosen_node_id),
                )
                .remote(self._spec)
            )
        except ValueError as exc:
            raise ConfigurationError(
                f"Ray cannot place engines of pool {self._spec.pool} ({self._needs.describe()}): "
                f"{exc}",
                param="engine.placement",
            ) from exc
        return self._actor

    def remove(self) -> None:
        """Kill the actor and give back what it reserved. Idempotent."""
        self.is_removed = True
        actor, self._actor = self._actor, None
        group, self._group = self._group, None
        if actor is not None:
            ray.kill(actor, no_restart=True)
        if group is not None:
            remove_placement_group(group)

    async def _reserve(self) -> None:
        """On the chosen node; where Ray finds room, if others hold that node's by now.

        Not with Ray's soft target: Ray 2.60 then often takes another node although there is room.
        """
        if self._chosen_node_id is not None:
            labels = self._needs.labels | {NODE_ID_LABEL: self._chosen_node_id}
            self._group = self._new_group(self._actor_name, labels)
            try:
                await self._wait_for_room(self._group, CHOSEN_NODE_TIMEOUT_S)
            except EngineError:
                remove_placement_group(self._group)
            else:
                return
        self._group = self._new_group(f"{self._actor_name}-elsewhere", self._needs.labels)
        await self._wait_for_room(self._group, self._spec.engine.placement_timeout_s)

    def _new_group(self, name: str, labels: dict[str, str]) -> PlacementGroup:
        return placement_group(
            [self._needs.resources],
            strategy="STRICT_PACK",
            name=name,
            bundle_label_selector=[labels] if labels else None,
        )

    async def _wait_for_room(self, group: PlacementGroup, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await _awaited(group.ready())
        except TimeoutError as exc:
            raise EngineError(
                f"no node of the Ray cluster had room for engine {self._spec.engine_id} "
                f"({self._needs.describe()}) within {timeout_s:g} s (engine.placement_timeout_s)"
            ) from exc
        except RayError as exc:
            raise EngineError(f"engine {self._spec.engine_id} was not placed: {exc}") from exc


def _actor_resources(
    needs: EngineNeeds, group: PlacementGroup | None, node_id: str | None
) -> dict[str, Any]:
    if group is not None:
        resources = dict(needs.resources)
        return {
            "num_cpus": resources.pop("CPU", 0.0),
            "num_gpus": resources.pop("GPU", 0.0),
            "resources": resources,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=0
            ),
        }
    if node_id is not None:
        # Not soft: Ray 2.60 then often takes another node although this one lives.
        strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        return {"num_cpus": 0, "scheduling_strategy": strategy}
    # No such node yet: the actor waits for one.
    return {"num_cpus": 0, "label_selector": needs.labels}


def _node_view(node: dict[str, Any], draining: Mapping[str, float | None]) -> NodeView:
    return NodeView(
        node_id=node["NodeID"],
        is_alive=node["Alive"],
        resources=node["Resources"],
        labels=node.get("Labels") or {},
        is_draining=node["NodeID"] in draining,
    )


async def _awaited(reference: Any) -> Any:
    return await reference
