"""A server is killed while its engine starts: nobody knows the engine yet, and nothing stays."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rollout_server.engine.host_sweep import sweep_host
from tests.support.models import make_model
from tests.support.server_process import (
    RAY_AGENTS,
    START_TIMEOUT_S,
    engine_files,
    left_by_engines,
    wait_until,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_next_start_on_the_host_removes_what_the_unknown_engine_left(tmp_path: Path) -> None:
    before = engine_files()
    model = make_model(tmp_path / "model", seed=11)
    config = tmp_path / "config.yaml"
    settings = {
        "name": "killed",
        "output_dir": str(tmp_path),
        "model": {"path": str(model), "dtype": "float32", "max_model_len": 256},
        "engine": {"num_kv_blocks": 200, "block_size": 32, "max_num_seqs": 8},
        "server": {"port": 0},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "rollout_server", "--config", str(config)],
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
        )
    try:
        wait_until(
            lambda: server.poll() is not None or len(registered(server.pid) - before) >= 2,
            START_TIMEOUT_S,
            "two of the engine's processes to register with OpenMP",
        )
        assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert not list((tmp_path / "killed" / "engines").glob("*")), "the server knows it already"
    finally:
        is_up = server.poll() is None
        below = psutil.Process(server.pid).children(recursive=True) if is_up else []
        # Named before the kill: afterwards some are gone already.
        family = [process for process in below if process.name() not in RAY_AGENTS]
        server.kill()
        server.wait(30)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert left_by_engines(before), "there was nothing to remove: the test shows nothing"
    sweep_host()
    assert left_by_engines(before) == set()


def registered(server_pid: int) -> set[str]:
    """OpenMP's files of processes below the server."""
    below = {process.pid for process in psutil.Process(server_pid).children(recursive=True)}
    found = set()
    for name in engine_files():
        owner = re.fullmatch(r"__KMP_REGISTERED_LIB_([0-9]+)_[0-9]+", name)
        if owner is not None and int(owner[1]) in below:
            found.add(name)
    return found
