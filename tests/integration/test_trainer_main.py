"""``python -m trainer`` as users start it: a Ray actor, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.models import make_micro_model
from tests.fakes.policy_server import PolicyServer, serve_policy
from trainer.__main__ import main

WAIT_S = 120.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PolicyServer]:
    model_path = make_micro_model(tmp_path / "micro")
    segments = tmp_path / "segments"
    segments.mkdir()
    with serve_policy(model_path, segments) as running:
        yield running


def write_config(tmp_path: Path, server_url: str, **trainer: Any) -> Path:
    path = tmp_path / "config.yaml"
    config = {
        "name": "test",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "micro")},
        "weights": {"shared_memory_dir": str(tmp_path / "segments")},
        "ray": {"num_cpus": 1, "object_store_mib": 80},
        "trainer": {
            "server_url": server_url,
            "api_timeout_s": 60,
            "num_threads": 1,
            "prompts_per_step": 2,
            "group_size": 2,
            "eval_every": 0,
            "eval_prompts": 2,
            "sampling": {"max_tokens": 4},
            "task": {"kind": "arithmetic", "num_terms": [2, 2], "max_operand": 9},
            **trainer,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--config", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def completed_steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_an_interrupt_saves_a_checkpoint_and_a_resume_finishes_the_run(
    server: PolicyServer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "test"
    config = write_config(tmp_path, server.url, num_steps=100000)
    process = start(config)
    deadline_s = time.monotonic() + WAIT_S
    while len(completed_steps(run_dir)) < 3 and time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "--resume" in output
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    last_step = completed_steps(run_dir)[-1]
    assert checkpoint.name == f"step-{last_step:06d}"

    override = f"trainer.num_steps={last_step + 1}"
    code, output = finish(start(config, "--resume", "--set", override))
    assert code == 0, output
    assert completed_steps(run_dir) == list(range(last_step + 2))


def test_a_failed_run_ends_with_code_1_and_the_reason(server: PolicyServer, tmp_path: Path) -> None:
    server.refuse_push = (422, "weight_verification_failed")
    code, output = finish(start(write_config(tmp_path, server.url, num_steps=3)))
    assert code == 1, output
    assert "error: refused with weight_verification_failed" in output


def test_a_wrong_configuration_ends_with_code_2_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "http://127.0.0.1:9", num_steps=-1)
    assert main(["--config", str(config)]) == 2
    assert "trainer.num_steps" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err
