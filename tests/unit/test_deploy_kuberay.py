"""deploy/kuberay says one thing in all of its files, and it is what the code reads."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray._private import ray_constants

from rollout_server.api import operations
from shared.api_keys import KEYS_VARIABLE
from shared.cli.doctor_checks import CheckStatus
from shared.cli.doctor_config import check_kv_budget
from shared.config.loading import ENVIRONMENT_PREFIX, RESERVED_ENVIRONMENT
from shared.config.run import RunConfig
from shared.config.server_access import check_server_access
from shared.credentials import KEY_VARIABLE
from tests.support import manifests
from tests.support.manifests import FOLDER, ROOT, Pod, find

GUIDE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
RAY_PODS = ("head", "server", "gpu")
DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
KUBECTL = shutil.which("kubectl")
SIGTERM_MARGIN_S = 30
STATE_MOVE_S = 120
"""A committed policy of some GiB goes from memory to a network disk in it."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return manifests.settings(tmp_path)


@pytest.fixture
def pods() -> dict[str, Pod]:
    return manifests.pods()


def test_the_configuration_in_the_config_map_loads_and_has_a_kv_budget(config: RunConfig) -> None:
    assert check_kv_budget(config).status is CheckStatus.OK
    assert config.engine.device == "cuda"


def test_the_server_may_start_on_all_addresses_with_the_keys_of_the_secret(
    config: RunConfig,
) -> None:
    keys = re.search(rf"--from-literal={KEYS_VARIABLE}=\"([^\"]+)\"", GUIDE)
    assert keys is not None
    text = keys[1].replace("$trainer_key", "k" * 43).replace("$metrics_key", "m" * 43)
    found = check_server_access(config.server, {KEYS_VARIABLE: text})
    trainer = found.find(b"k" * 43)
    assert trainer is not None
    assert {scope.value for scope in trainer.scopes} == {"rollout", "admin"}


def test_secret_keys_are_the_variables_the_code_reads_and_the_guide_makes(
    pods: dict[str, Pod],
) -> None:
    references = {}
    for pod in pods.values():
        for name, entry in pod.environment().items():
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                references[pod.name, name] = (reference["name"], reference["key"])
    assert references == {
        ("head", KEY_VARIABLE): ("rollout-keys", KEY_VARIABLE),
        ("server", KEYS_VARIABLE): ("rollout-keys", KEYS_VARIABLE),
    }
    made = re.search(r"create secret generic rollout-keys(.*?)\n\n", GUIDE, re.DOTALL)
    assert made is not None
    assert set(re.findall(r"--from-literal=(\w+)=", made[1])) == {KEY_VARIABLE, KEYS_VARIABLE}


def test_no_pod_is_given_a_variable_that_settings_would_refuse(pods: dict[str, Pod]) -> None:
    for pod in pods.values():
        ours = {name for name in pod.environment() if name.startswith(ENVIRONMENT_PREFIX)}
        assert ours <= RESERVED_ENVIRONMENT, pod.name


def test_kubernetes_adds_no_variables_of_services(pods: dict[str, Pod]) -> None:
    """SLIPSTREAM_PORT of a service would be an unknown setting."""
    assert all(pod.spec["enableServiceLinks"] is False for pod in pods.values())
    prefix = ENVIRONMENT_PREFIX.rstrip("_").lower()
    for _, manifest in manifests.manifests():
        if manifest["kind"] in {"Service", "RayCluster"}:
            assert not manifest["metadata"]["name"].startswith(prefix)


def test_probes_ask_routes_of_the_app_on_the_servers_port(
    pods: dict[str, Pod], config: RunConfig
) -> None:
    routes = {getattr(route, "path", None) for route in operations.router.routes}
    container = pods["server"].main
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    expected = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in expected.items():
        request = container[probe]["httpGet"]
        assert request["path"] == path
        assert path in routes
        assert ports[request["port"]] == config.server.port


def test_a_start_may_take_as_long_as_engines_may(pods: dict[str, Pod], config: RunConfig) -> None:
    probe = pods["server"].main["startupProbe"]
    allowed_s = probe["periodSeconds"] * probe["failureThreshold"]
    # Its engines may wait for a node first.
    engine = config.engine
    assert allowed_s >= engine.start_timeout_s + engine.placement_timeout_s


def test_services_policies_and_the_trainer_use_the_servers_port(config: RunConfig) -> None:
    service = find("Service", "rollout-server")
    (port,) = service["spec"]["ports"]
    assert port["port"] == config.server.port
    (rule,) = find("NetworkPolicy", "rollout-server")["spec"]["ingress"]
    assert [entry["port"] for entry in rule["ports"]] == [config.server.port]
    assert config.trainer.server_url == f"http://{service['metadata']['name']}:{port['port']}"


def test_the_dashboard_port_is_the_one_jobs_may_reach(pods: dict[str, Pod]) -> None:
    ports = {port["name"]: port["containerPort"] for port in pods["head"].main["ports"]}
    (rule,) = find("NetworkPolicy", "ray-head")["spec"]["ingress"]
    assert [entry["port"] for entry in rule["ports"]] == [ports["dashboard"]]
    submitter = pods["submitter"].template["metadata"]["labels"]
    allowed = rule["from"][0]["podSelector"]["matchLabels"]
    assert allowed.items() <= submitter.items()


def test_pods_get_longer_to_end_than_draining_takes(
    pods: dict[str, Pod], config: RunConfig
) -> None:
    assert hasattr(ray_constants, DRAIN_VARIABLE), "Ray reads it"
    kept = pods["gpu"].environment()[DRAIN_VARIABLE]
    assert float(kept["value"]) == config.engine.drain_timeout_s
    drain_s = config.engine.drain_timeout_s + SIGTERM_MARGIN_S
    for name in RAY_PODS:
        assert pods[name].spec["terminationGracePeriodSeconds"] > drain_s, name
    server_s = drain_s + config.server.shutdown_timeout_s + STATE_MOVE_S
    assert pods["server"].spec["terminationGracePeriodSeconds"] > server_s


def test_selectors_pick_the_pods_of_the_cluster() -> None:
    cluster = find("RayCluster")
    groups = {group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]}
    selectors = [find("Service", "rollout-server")["spec"]["selector"]]
    for _, manifest in manifests.manifests():
        if manifest["kind"] == "PodDisruptionBudget":
            selectors.append(manifest["spec"]["selector"]["matchLabels"])
        if manifest["kind"] == "NetworkPolicy":
            selectors.append(manifest["spec"]["podSelector"]["matchLabels"])
    selectors.append(find("RayJob")["spec"]["clusterSelector"])
    for selector in selectors:
        assert selector["ray.io/cluster"] == cluster["metadata"]["name"]
        assert selector.get("ray.io/group", "server") in groups
        assert selector.get("ray.io/node-type", "head") == "head"


def test_every_ray_pod_has_a_disruption_budget_that_kubernetes_can_keep() -> None:
    """For pods of an operator only a whole number in minAvailable is allowed."""
    budgets = [m for _, m in manifests.manifests() if m["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == len(RAY_PODS)
    for budget in budgets:
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]


def test_nobody_runs_as_root_or_may_become_it(pods: dict[str, Pod]) -> None:
    for pod in pods.values():
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["runAsUser"] == 1000
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.containers:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_directories_that_resume_needs_are_made_before(
    pods: dict[str, Pod], config: RunConfig
) -> None:
    made = {
        pod.name: container["command"][-1]
        for pod in pods.values()
        for container in pod.containers
        if container.get("command", [])[:1] == ["mkdir"]
    }
    assert made["server"] == str(config.run_dir)
    command = shlex.split(find("RayJob")["spec"]["entrypoint"])
    overrides = dict(itertools.pairwise(command))
    output_dir = overrides["--set"].removeprefix("output_dir=")
    assert made["head"] == f"{output_dir}/{config.name}"
    assert "--resume" in command
    assert overrides["--config"] == pods["server"].main["args"][-1]
    assert Path(overrides["--config"]).parent.as_posix() in pods["head"].mounts()


def test_what_settings_name_is_on_the_shared_volume(
    pods: dict[str, Pod], config: RunConfig
) -> None:
    paths = [config.model.path, config.output_dir, getattr(config.trainer.task, "train_path", "")]
    assert all(path.startswith("/data/") for path in paths)
    claim = find("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in RAY_PODS:
        volume = pods[name].volume(pods[name].mounts()["/data"])
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_server_ends_with_its_raylet_in_the_container_that_kuberay_watches(
    pods: dict[str, Pod],
) -> None:
    server = pods["server"]
    assert server.template["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    assert server.main["command"] == ["tini", "--", "with-raylet"]
    assert server.main["args"][:2] == ["slipstream", "serve"]
    assert len(server.spec["containers"]) == 1
    # With autoscaler v2 KubeRay refuses any other.
    assert all(pod.spec.get("restartPolicy", "Never") == "Never" for pod in pods.values())


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not here")
def test_kubectl_renders_it_with_the_image_of_the_kustomization(tmp_path: Path) -> None:
    folder = tmp_path / "kuberay"
    shutil.copytree(FOLDER, folder)
    file = folder / "kustomization.yaml"
    text = file.read_text()
    file.write_text(text.replace("newName: slipstream", "newName: example/rollouts"))
    done = subprocess.run(
        [str(KUBECTL), "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rendered = {(m["kind"], m["metadata"]["name"]): m for m in yaml.safe_load_all(done.stdout)}
    for _, manifest in manifests.manifests():
        if manifest["kind"] != "RayJob":
            expected = yaml.safe_dump(manifest).replace(
                "slipstream:0.1.0", "example/rollouts:0.1.0"
            )
            found = rendered[manifest["kind"], manifest["metadata"]["name"]]
            assert found == yaml.safe_load(expected)


def test_kustomization_lists_every_manifest_but_the_job() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {name for name, _ in manifests.manifests()}
    assert set(kustomization["resources"]) == files - {"rayjob.yaml"}
    namespace = find("Namespace")["metadata"]["name"]
    assert kustomization["namespace"] == namespace
    for name, manifest in manifests.manifests():
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == namespace, name
