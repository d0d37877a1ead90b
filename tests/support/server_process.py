"""A rollout server as users start it: a process of its own, with real Ray and real engines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from safetensors.torch import load_file

from rollout_server.engine.scratch import NAME
from shared.delta_writer import write_delta
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorSpec, write_segment
from shared.weights import segment_name

START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 90
SHARED_MEMORY = Path("/dev/shm")
RAY_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Poll a condition.

    Raises:
        AssertionError: naming what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)


VLLM_TEMPORARY = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|vllm_dist_\w+")
"""Sockets and rendezvous files (vLLM 0.32.0: ``vllm.utils.network_utils``)."""


def engine_files() -> set[str]:
    """Names of what engines have outside themselves: shared memory, and temporary files."""
    temporary = {path.name for path in Path(tempfile.gettempdir()).iterdir()}
    return {path.name for path in SHARED_MEMORY.iterdir()} | {
        name for name in temporary if VLLM_TEMPORARY.fullmatch(name) or NAME.fullmatch(name)
    }


def left_by_engines(before: set[str]) -> set[str]:
    """What is new and belongs to no process that lives: others may be at work on this machine."""
    return {name for name in engine_files() - before if not _has_living_owner(name)}


def _has_living_owner(name: str) -> bool:
    """OpenMP's files and the records of engines carry their process's pid."""
    owner = re.match(r"(?:__KMP_REGISTERED_LIB_|slipstream\.(?:engine\.)?)([0-9]+)[._]", name)
    return owner is not None and psutil.pid_exists(int(owner[1]))


class ServerProcess:
    """Starts on construction; ``stop`` or ``kill`` it."""

    def __init__(self, directory: Path, model: Path, settings: dict[str, Any]) -> None:
        config = directory / "config.yaml"
        config.write_text(  # JSON is YAML
            json.dumps(
                {
                    "name": "served",
                    "output_dir": str(directory),
                    "model": {"path": str(model), "dtype": "float32", "max_model_len": 256},
                    "engine": {"num_kv_blocks": 200, "block_size": 32, "max_num_seqs": 32},
                    "speculation": {"mode": "always", "num_speculative_tokens": 3},
                    "server": {"port": 0},
                    **settings,
                }
            )
        )
        log_path = directory / "server.log"
        with log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout_server", "--config", str(config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
            )
        ready = directory / "served" / "server.json"
        ready.unlink(missing_ok=True)
        try:
            wait_until(
                lambda: ready.exists() or self._process.poll() is not None,
                START_TIMEOUT_S,
                "the server to start",
            )
            assert ready.exists(), log_path.read_text()[-3000:]
        except BaseException:
            self.kill()
            raise
        self.client = httpx.Client(base_url=json.loads(ready.read_text())["url"], timeout=120)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """SIGTERM; checks that it ends well and that no process is left."""
        family = psutil.Process(self.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(STOP_TIMEOUT_S) == 0
        _, alive = psutil.wait_procs(family, timeout=15)
        assert alive == [], "processes left behind"

    def kill(self) -> None:
        """SIGKILL; waits until what it had started is gone too, but for Ray's own agents: they take
        a minute or two to notice that their node has gone."""
        if self._process.poll() is not None:
            return
        family = [
            process
            for process in psutil.Process(self.pid).children(recursive=True)
            if process.name() not in RAY_AGENTS
        ]
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == [], f"left behind by a killed server: {[p.name() for p in alive]}"

    def publish(self, model: Path, version: int, base_version: int) -> httpx.Response:
        """Push a model directory's weights, as a trainer does."""
        return push_to(self.client, model, version, base_version)

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[dict[str, Any]]:
        """One greedy sample of every prompt."""
        body = {
            "prompts": [{"prompt_token_ids": prompt} for prompt in prompts],
            "sampling": {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True},
        }
        answer = self.client.post("/v1/rollouts", json=body)
        assert answer.status_code == 200, answer.text
        return [group["samples"][0] for group in answer.json()["groups"]]


def push_to(
    client: httpx.Client,
    model: Path,
    version: int,
    base_version: int,
    *,
    only_changes: bool = False,
) -> httpx.Response:
    """Push a model directory's weights to a server, as a trainer does.

    Args:
        only_changes: as a delta, where the server has a file to make it from.
    """
    base = client.get("/v1/weights").json()["committed_segment"] if only_changes else None
    path = SHARED_MEMORY / segment_name(os.getpid(), version)
    tensors = load_file(model / "model.safetensors")
    specs = [TensorSpec(name, "F32", tuple(t.shape)) for name, t in tensors.items()]
    try:
        manifest = _write(path, specs, lambda spec: [tensors[spec.name].numpy()], base)
        body = {
            "version": version,
            "base_version": base_version,
            "manifest": manifest.model_dump(),
        }
        return client.post("/v1/weights", json=body)
    finally:
        path.unlink(missing_ok=True)


def _write(
    path: Path,
    specs: list[TensorSpec],
    produce: Callable[[TensorSpec], list[Any]],
    base: str | None,
) -> WeightManifest:
    if base is None:
        return write_segment(path, specs, produce)
    return write_delta(path, specs, produce, base_path=SHARED_MEMORY / base, limit_bytes=1 << 30)
