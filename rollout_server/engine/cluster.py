"""Everything Ray: starting or joining the cluster, and turning ``EngineActor`` into a Ray actor."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import ray

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec, engine_environment
from shared.config.server import RayConfig
from shared.errors import UnavailableError

MIB = 1024 * 1024
FREE_OBJECTS_AT_ONCE = ("RAY_free_objects_period_milliseconds", "0")
"""By default Ray 2.60 frees once a second what nobody refers to; by then many buckets of weights
would have taken new memory in the store, where two are enough. Read by each node at its start."""
MAX_CONCURRENT_CALLS = 1024
"""Calls an engine actor runs at once; each sample group in flight is one."""


def start_or_join_cluster(config: RayConfig) -> str:
    """Connect this process to Ray.

    Returns:
        Address under which the trainer can join the same cluster.

    Raises:
        UnavailableError: the configured cluster cannot be reached.
    """
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


def create_engine_actor(spec: EngineSpec) -> Any:
    """Place one engine. Returns the Ray actor handle; the actor has not started vLLM yet."""
    num_gpus = spec.engine.tensor_parallel_size if spec.device == "cuda" else 0
    return (
        ray.remote(EngineActor)
        .options(
            name=spec.engine_id,
            num_cpus=spec.engine.num_cpus,
            num_gpus=num_gpus,
            max_concurrency=MAX_CONCURRENT_CALLS,
            max_restarts=0,  # a replacement is a new engine with a new id
            runtime_env={"env_vars": engine_environment(spec)},
        )
        .remote(spec)
    )
