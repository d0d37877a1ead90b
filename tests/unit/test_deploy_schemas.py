"""Every object of deploy/kuberay is one that Kubernetes and KubeRay accept, field by field."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support import manifests
from tests.support.kuberay_schema import SCHEMAS, kubernetes_parts
from tests.support.manifests import PATCH, find, merged

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not here (deploy/constraints/dev.txt)"
)
KUBERNETES_VERSION = "1.33"
OBJECTS = [
    pytest.param(manifest, id=f"{manifest['kind']}-{manifest['metadata']['name']}")
    for _, manifest in manifests.manifests()
]


def check(manifest: dict[str, Any]) -> None:
    """
    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: what is wrong, and where.
    """
    schema = SCHEMAS.get(manifest["kind"])
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
        return
    jsonschema.validate(manifest, schema)
    for part in kubernetes_parts(manifest):
        kubernetes_validate.validate(part, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("manifest", OBJECTS)
def test_the_object_is_valid(manifest: dict[str, Any]) -> None:
    check(manifest)


@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_our_schemas_are_schemas(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind])


def test_the_cluster_stays_valid_with_fault_tolerance_of_its_control_plane() -> None:
    patch = yaml.safe_load(PATCH.read_text(encoding="utf-8"))
    cluster = merged(find("RayCluster"), patch)
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert cluster["spec"]["workerGroupSpecs"] == find("RayCluster")["spec"]["workerGroupSpecs"]
    check(cluster)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", ("spec", "enableInTreeAutoscalling"), True),
        ("RayCluster", ("spec", "autoscalerOptions", "version"), "v3"),
        ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "enableServiceLink"), False),
        ("RayCluster", ("spec", "autoscalerOptions", "resources", "limit"), {}),
        ("RayJob", ("spec", "submissionMode"), "K8sJob"),
        ("RayJob", ("spec", "submitterPodTemplate", "spec", "containers"), "none"),
        ("Service", ("spec", "ports"), "http"),
        ("PersistentVolumeClaim", ("spec", "accessMode"), ["ReadWriteMany"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_a_wrong_field_is_found(kind: str, path: tuple[str, ...], value: object) -> None:
    manifest = copy.deepcopy(find(kind))
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_the_job_is_one_that_kuberay_runs_on_a_cluster_it_did_not_make() -> None:
    """Rules of its controller that no schema has."""
    job = find("RayJob")["spec"]
    assert job.get("backoffLimit", 0) == 0
    assert not job.get("suspend", False)
    assert not job.get("shutdownAfterJobFinishes", False)
    assert "rayClusterSpec" not in job


def test_groups_give_resources_and_labels_in_one_place() -> None:
    """Another rule of the controller."""
    cluster = find("RayCluster")["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "labels" not in group["rayStartParams"]
        assert not group.get("resources") or not group["rayStartParams"].keys() & {
            "num-cpus",
            "num-gpus",
            "memory",
            "resources",
        }
    version = tuple(int(part) for part in cluster["rayVersion"].split(".")[:2])
    assert version >= (2, 52), "authOptions.mode token needs it"
