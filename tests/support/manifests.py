"""The manifests of ``deploy/kuberay``, and the pods in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.config.loading import load_run_config
from shared.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
PATCH = FOLDER / "gcs-fault-tolerance.yaml"
NOT_MANIFESTS = {"kustomization.yaml", PATCH.name}

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """One pod template, wherever it stands."""

    name: str
    """``head``, a worker group, or ``submitter``."""
    template: Manifest

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def main(self) -> Manifest:
        """The container that KubeRay treats as Ray's."""
        container: Manifest = self.spec["containers"][0]
        return container

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def environment(self) -> dict[str, Manifest]:
        return {entry["name"]: entry for entry in self.main.get("env", [])}

    def mounts(self) -> dict[str, str]:
        """Volumes of the main container by where they are mounted."""
        return {mount["mountPath"]: mount["name"] for mount in self.main.get("volumeMounts", [])}

    def volume(self, name: str) -> Manifest:
        found: Manifest = next(v for v in self.spec["volumes"] if v["name"] == name)
        return found


def manifests() -> Iterator[tuple[str, Manifest]]:
    """Every object, with the file it stands in."""
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.name in NOT_MANIFESTS:
            continue
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, document


def find(kind: str, name: str | None = None) -> Manifest:
    """The one object of a kind (and name)."""
    (found,) = (
        manifest
        for _, manifest in manifests()
        if manifest["kind"] == kind and name in (None, manifest["metadata"]["name"])
    )
    return found


def pods() -> dict[str, Pod]:
    cluster = find("RayCluster")["spec"]
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    templates["submitter"] = find("RayJob")["spec"]["submitterPodTemplate"]
    return {name: Pod(name=name, template=template) for name, template in templates.items()}


def worker_group(name: str) -> Manifest:
    (found,) = (
        group
        for group in find("RayCluster")["spec"]["workerGroupSpecs"]
        if group["groupName"] == name
    )
    group: Manifest = found
    return group


def settings(directory: Path) -> RunConfig:
    """The configuration in the ConfigMap, through the project's own loader."""
    path = directory / "config.yaml"
    path.write_text(find("ConfigMap")["data"]["config.yaml"], encoding="utf-8")
    return load_run_config(path, environment={})


def quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity with a binary suffix."""
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    return int(text[:-2]) * units[text[-2:]]


def merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386) applied."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
