"""What deploy/kuberay gives its pods is what settings and Ray need of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.scripts.scripts import start as ray_start

from rollout_server.engine.cluster import FREE_OBJECTS_AT_ONCE
from shared.config.run import RunConfig
from shared.sizing.engine_memory import num_push_bytes, num_trainer_bytes, plan_engine_memory
from shared.sizing.tables import MODELS, gpu_memory_bytes
from shared.types import TransportKind
from tests.support import manifests
from tests.support.manifests import Pod, find, quantity, worker_group

RAY_PODS = ("head", "server", "gpu")
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return manifests.settings(tmp_path)


@pytest.fixture
def pods() -> dict[str, Pod]:
    return manifests.pods()


def test_weights_travel_over_ray_between_pods_with_room_for_two_buckets(
    config: RunConfig,
) -> None:
    assert config.weights.transport is TransportKind.RAY
    cluster = find("RayCluster")["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        store_bytes = int(group["rayStartParams"]["object-store-memory"])
        assert store_bytes >= 4 * config.weights.piece_bytes


def test_shared_memory_holds_two_versions_and_the_object_store(pods: dict[str, Pod]) -> None:
    needed = num_push_bytes(MODELS[MODEL], 2)
    for name in ("server", "gpu"):
        pod = pods[name]
        volume = pod.volume(pod.mounts()["/dev/shm"])["emptyDir"]
        assert volume["medium"] == "Memory"
        store = int(worker_group(name)["rayStartParams"]["object-store-memory"])
        room = quantity(volume["sizeLimit"])
        assert room > needed + store
        assert quantity(pod.main["resources"]["limits"]["memory"]) > 2 * room


def test_engines_and_trainer_of_the_configuration_fit_their_gpus(config: RunConfig) -> None:
    shape = MODELS[MODEL]
    gpu = gpu_memory_bytes("80 GB")
    assert plan_engine_memory(shape, config, gpu).num_sequences(4096) > config.engine.max_num_seqs
    assert num_trainer_bytes(shape) < gpu / 2  # the other half: activations


def test_nodes_free_objects_as_our_own_clusters_do(pods: dict[str, Pod]) -> None:
    name, value = FREE_OBJECTS_AT_ONCE
    for pod in RAY_PODS:
        assert pods[pod].environment()[name]["value"] == value


def ray_start_options() -> set[str]:
    return {
        option.removeprefix("--")
        for parameter in ray_start.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_ray_start_has_the_options_that_groups_give_it() -> None:
    cluster = find("RayCluster")["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["rayStartParams"].keys() <= ray_start_options()
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_rays_own_autoscaler_reads_the_cluster_and_has_a_gpu_for_everyone(
    config: RunConfig,
) -> None:
    scaling: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(find("RayCluster"))
    nodes = scaling["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert nodes["server"]["resources"].get("GPU", 0) == 0
    assert nodes["server"]["min_workers"] == nodes["server"]["max_workers"] == 1
    gpus = nodes["gpu"]["resources"]["GPU"] * nodes["gpu"]["max_workers"]
    trainer_gpus = 1
    assert gpus == config.engine.max_count * config.engine.tensor_parallel_size + trainer_gpus
    assert nodes["gpu"]["resources"]["GPU"] >= config.engine.tensor_parallel_size
    assert nodes["gpu"]["idle_timeout_s"] > config.engine.drain_timeout_s
