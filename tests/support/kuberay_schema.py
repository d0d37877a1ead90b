"""What KubeRay accepts in a RayCluster and a RayJob, as JSON schemas.

No package has KubeRay's CRDs. These are the field names, types and enums of its Go types
(ray-project/kuberay, ``ray-operator/apis/ray/v1/raycluster_types.go`` and ``rayjob_types.go``,
Apache-2.0, release 1.6), written down anew, without the fields that need a feature gate. Unknown
fields are errors, as under ``kubectl apply --validate=strict``. What is Kubernetes' own in them
(pod templates, resources) is left to Kubernetes' schemas: see ``kubernetes_parts``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NATURAL: Schema = {"type": "integer", "minimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
KUBERNETES: Schema = {}
"""Checked elsewhere."""


def fields(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = fields("name", name=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS)
REDIS_CREDENTIAL = fields(value=STRING, valueFrom={"type": "object"})
GROUP = {
    "rayStartParams": STRINGS,
    "resources": STRINGS,
    "labels": STRINGS,
    "template": KUBERNETES,
}
CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=STRING,
    suspend=BOOLEAN,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    authOptions=fields(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=NATURAL,
        image=STRING,
        imagePullPolicy=one_of("Always", "Never", "IfNotPresent"),
        resources=KUBERNETES,
        securityContext=KUBERNETES,
        env=KUBERNETES,
        envFrom=KUBERNETES,
        volumeMounts=KUBERNETES,
    ),
    gcsFaultToleranceOptions=fields(
        "redisAddress",
        redisAddress=STRING,
        redisUsername=REDIS_CREDENTIAL,
        redisPassword=REDIS_CREDENTIAL,
        externalStorageNamespace=STRING,
    ),
    headServiceAnnotations=STRINGS,
    headGroupSpec=fields(
        "template",
        headService=KUBERNETES,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=BOOLEAN,
        **GROUP,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=STRING,
            replicas=NATURAL,
            minReplicas=NATURAL,
            maxReplicas=NATURAL,
            numOfHosts={"type": "integer", "minimum": 1},
            idleTimeoutSeconds=NATURAL,
            scaleStrategy=fields(workersToDelete={"type": "array", "items": STRING}),
            **GROUP,
        ),
    },
)
RAY_CLUSTER = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayCluster"),
    metadata=METADATA,
    spec=CLUSTER_SPEC,
)
RAY_JOB = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=METADATA,
    spec=fields(
        entrypoint=STRING,
        runtimeEnvYAML=STRING,
        jobId=STRING,
        metadata=STRINGS,
        clusterSelector=STRINGS,
        rayClusterSpec=CLUSTER_SPEC,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=fields(backoffLimit=NATURAL),
        submitterPodTemplate=KUBERNETES,
        entrypointNumCpus={"type": "number", "minimum": 0},
        entrypointNumGpus={"type": "number", "minimum": 0},
        entrypointResources=STRING,
        backoffLimit=NATURAL,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=NATURAL,
        suspend=BOOLEAN,
    ),
)
SCHEMAS = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}


def kubernetes_parts(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods KubeRay will make of it, as Kubernetes' own objects."""
    spec = manifest["spec"]
    clusters = [spec] if manifest["kind"] == "RayCluster" else []
    clusters += [spec["rayClusterSpec"]] if "rayClusterSpec" in spec else []
    templates = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    for cluster in clusters:
        templates.append(cluster["headGroupSpec"]["template"])
        templates += [group["template"] for group in cluster.get("workerGroupSpecs", [])]
        options = cluster.get("autoscalerOptions", {})
        shared = {key: options[key] for key in ("resources", "securityContext") if key in options}
        templates.append({"spec": {"containers": [{"name": "autoscaler", **shared}]}})
    for template in templates:
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template.get("metadata", {})},
            "spec": template["spec"],
        }
