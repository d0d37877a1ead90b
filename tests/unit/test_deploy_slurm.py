"""deploy/slurm/rollout.sbatch over stand-ins of Slurm, Ray and slipstream."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.engine.cluster import FREE_OBJECTS_AT_ONCE
from rollout_server.launch import READY_FILE_NAME
from shared.config.engine import EngineConfig
from shared.config.loading import load_run_config
from shared.config.server import ServerConfig
from shared.types import TransportKind
from tests.support.stand_ins import Stage
from trainer.launch import STOP_TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "deploy" / "slurm" / "rollout.sbatch"
TEXT = SBATCH.read_text(encoding="utf-8")
PRESET = ROOT / "deploy" / "configs" / "node-8gpu-7b.yaml"
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$NOTES"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
RAY = """
if sys.argv[1] == "health-check":
    os._exit(0 if "ray started start --head" in open(os.environ["NOTES"]).read() else 1)
name = "head" if "--head" in sys.argv else "workers"
note("has " + " ".join(f"{key}={os.environ[key]}" for key in
    ("RAY_AUTH_MODE", "RAY_free_objects_period_milliseconds", "SRUN_CPUS_PER_TASK")))
name = "ray"
note(started)
name = "head" if "--head" in sys.argv else "workers"
while True:
    time.sleep(0.05)
"""
SLIPSTREAM = """
name = sys.argv[1]
note(started)
workers = "ray started start --address" if os.environ["SLURM_JOB_NUM_NODES"] != "1" else ""
while name == "train" and workers not in open(os.environ["NOTES"]).read():
    time.sleep(0.05)  # so that all of them have noted something before the job ends
if name == "train" and os.environ.get("TRAIN_CODE"):
    os._exit(int(os.environ["TRAIN_CODE"]))
if name == "serve":
    settings = dict(item.split("=", 1) for item in sys.argv if "=" in item)
    file = os.path.join(settings["output_dir"], settings["name"], "server.json")
    if os.environ.get("SERVE_CODE"):
        os._exit(int(os.environ["SERVE_CODE"]))
    with open(file + ".new", "w") as ready:
        json.dump({"url": "http://127.0.0.1:8000"}, ready)
    os.rename(file + ".new", file)
while True:
    time.sleep(0.05)
"""


def prepared(directory: Path) -> Stage:
    stage = Stage(directory)
    stage.executable("srun", SRUN)
    stage.executable("scontrol", "#!/usr/bin/env bash\necho node-a\necho node-b\n")
    stage.executable("hostname", "#!/usr/bin/env bash\necho '10.1.2.3 fe80::1'\n")
    stage.executable("python", f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    stage.stand_in("ray", RAY)
    stage.stand_in("slipstream", SLIPSTREAM)
    return stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    found = prepared(tmp_path)
    yield found
    found.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """After a job of two nodes whose trainer has finished."""
    found = prepared(tmp_path_factory.mktemp("trained"))
    process = job(found, TRAIN_CODE="0")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    yield found
    found.close()


def job(stage: Stage, **environment: str) -> subprocess.Popen[str]:
    variables = {
        "CONFIG": str(PRESET),
        "OUTPUT_DIR": str(stage.directory / "runs"),
        "BIN": str(stage.bin),
        "SLURM_SUBMIT_DIR": str(stage.directory),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": "12",
    }
    return stage.start("bash", str(SBATCH), **variables | environment)


def of(stage: Stage, *names: str) -> list[str]:
    return [line for line in stage.notes() if line.split()[0] in names]


def test_ray_starts_on_every_node_then_the_server_then_the_trainer(trained: Stage) -> None:
    head, workers = of(trained, "ray")
    assert "--head --node-ip-address=10.1.2.3 --port=6379" in head
    assert "start --address=10.1.2.3:6379" in workers
    steps = [line for line in of(trained, "srun") if "ray start" in line]
    assert "--nodes=1 --ntasks=1 --nodelist=node-a" in steps[0]
    assert "--nodes=1 --ntasks=1 --exclude=node-a" in steps[1]
    (serve,) = of(trained, "serve")[:1]
    (train,) = of(trained, "train")[:1]
    assert trained.notes().index(serve) < trained.notes().index(train)
    assert "--url http://127.0.0.1:8000" in train


def test_all_nodes_of_a_larger_job_but_the_first_are_workers(stage: Stage) -> None:
    job(stage, SLURM_JOB_NUM_NODES="5", TRAIN_CODE="0").communicate(timeout=60)
    assert any("--nodes=4 --ntasks=4 --exclude=node-a" in line for line in of(stage, "srun"))


def test_one_node_has_no_workers(stage: Stage) -> None:
    job(stage, SLURM_JOB_NUM_NODES="1", TRAIN_CODE="0").communicate(timeout=60)
    assert len(of(stage, "ray")) == 1


def test_ray_asks_for_a_token_and_frees_at_once_and_has_the_cpus_of_its_task(
    trained: Stage,
) -> None:
    name, value = FREE_OBJECTS_AT_ONCE
    expected = f"head has RAY_AUTH_MODE=token {name}={value} SRUN_CPUS_PER_TASK=12"
    assert expected in trained.notes()


def test_keys_are_for_server_and_trainer_alone(trained: Stage) -> None:
    assert of(trained, "serve")[0].endswith(" with SLIPSTREAM_API_KEYS")
    assert of(trained, "train")[0].endswith(" with SLIPSTREAM_API_KEY")
    assert not any(" with " in line for line in of(trained, "ray"))


def test_the_settings_it_adds_are_settings(trained: Stage) -> None:
    for line in (of(trained, "serve")[0], of(trained, "train")[0]):
        overrides = re.findall(r"--set (\S+)", line)
        config = load_run_config(PRESET, overrides, environment={})
        assert config.ray.address == "10.1.2.3:6379"
        assert config.weights.transport is TransportKind.RAY
        assert config.run_dir.is_dir(), "--resume goes on in a directory that is there"
        assert "--resume" in line


def test_a_stop_ends_trainer_server_and_ray_in_this_order(stage: Stage) -> None:
    process = job(stage, END_S="0.3")
    stage.wait_for("train started")
    stage.wait_for("ray started start --address")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    ends = [line for line in stage.notes() if line.endswith(("told to end", " ended"))]
    expected = [
        f"{name} {what}" for name in ("train", "serve") for what in ("told to end", "ended")
    ]
    assert ends[:4] == expected
    assert sorted(ends[4:]) == sorted(
        f"{name} {what}" for name in ("head", "workers") for what in ("told to end", "ended")
    )


def test_a_trainer_that_fails_ends_the_job_with_its_code(stage: Stage) -> None:
    process = job(stage, TRAIN_CODE="5")
    process.communicate(timeout=60)
    assert process.returncode == 5
    assert "serve ended" in stage.notes()


def test_a_server_that_does_not_start_ends_the_job_with_its_code(stage: Stage) -> None:
    process = job(stage, SERVE_CODE="2")
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert not of(stage, "train")
    assert "head ended" in stage.notes()


def test_without_a_trainer_the_server_runs_until_it_is_stopped(stage: Stage) -> None:
    process = job(stage, TRAIN="0")
    stage.wait_for("serve started")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not of(stage, "train")
    assert "serve ended" in stage.notes()


def test_the_ready_file_is_the_servers() -> None:
    assert f"/{READY_FILE_NAME}" in TEXT


def test_slurm_says_so_before_the_time_is_up_and_early_enough() -> None:
    seconds = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", TEXT, re.MULTILINE)
    assert seconds is not None
    engine, server = EngineConfig(), ServerConfig()
    longest_s = STOP_TIMEOUT_S + engine.drain_timeout_s + server.shutdown_timeout_s
    assert int(seconds[1]) > 2 * longest_s


def test_directives_come_before_the_first_command() -> None:
    """Slurm reads none behind it."""
    lines = TEXT.splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))
