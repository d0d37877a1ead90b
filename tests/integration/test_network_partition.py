"""The cable between the server's host and an engine's is cut for longer than the server waits.

Two hosts made of namespaces (``tests/support/net_hosts.py``), a Ray node and room for one engine on
each. What the cut engine held is answered by the other; it goes on all the same, and what it has to
say when the cable is joined again is for nobody.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.models import make_model, random_prompts
from tests.support.net_hosts import ROOT, Cable, Host, network_names, two_hosts, why_not
from tests.support.rollout_checks import (
    check_books,
    engines_of,
    greedy_body,
    metrics_of,
    tokens_of_whole,
)
from tests.support.server_process import (
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    engine_files,
    left_by_engines,
    wait_until,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

GCS_PORT = 6379
STORE_BYTES = 80 << 20
NUM_TOKENS = 300
NUM_REPEATS = 8
ANSWER_TIMEOUT_S = 120.0
STATUS_TIMEOUT_S = 2.0
NUM_TIMEOUTS = 2
RAY = str(Path(sys.executable).with_name("ray"))


class Service:
    """A Ray node on each host, the server on the near one, a client beside it."""

    def __init__(self, near: Host, far: Host, cable: Cable, directory: Path, model: Path) -> None:
        self.near, self.far, self.cable = near, far, cable
        self._directory = directory
        self._environment = {
            # gRPC would ask a proxy, of which there is none between these hosts.
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith("SLIPSTREAM_") and not k.lower().endswith("_proxy")
            },
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            # These hosts are alone; by default the head would ask the others for a token.
            "RAY_AUTH_MODE": "disabled",
        }
        gcs = f"{near.address}:{GCS_PORT}"
        head = ("--head", f"--port={GCS_PORT}", "--include-dashboard=false")
        self._start_ray(near, *head)
        self._start_ray(far, f"--address={gcs}")
        config = directory / "config.yaml"
        config.write_text(json.dumps(self._settings(gcs, model)))  # JSON is YAML
        log = directory / "server.log"
        command = [sys.executable, "-m", "rollout_server", "--config", str(config)]
        self._server = near.run(command, log, self._environment)
        ready = directory / "cut" / "server.json"
        wait_until(
            lambda: ready.exists() or self._server.poll() is not None,
            START_TIMEOUT_S,
            "the server to start",
        )
        assert ready.exists(), log.read_text()[-3000:]
        self._url = json.loads(ready.read_text())["url"]

    def _start_ray(self, host: Host, *arguments: str) -> None:
        log = self._directory / f"ray-{host.name}.log"
        common = (f"--node-ip-address={host.address}", "--num-cpus=1", "--block")
        store = f"--object-store-memory={STORE_BYTES}"
        command = [RAY, "start", *common, store, *arguments]
        process = host.run(command, log, self._environment)
        wait_until(
            lambda: "Ray runtime started" in log.read_text() or process.poll() is not None,
            START_TIMEOUT_S,
            f"Ray on {host.name}",
        )
        assert process.poll() is None, log.read_text()[-3000:]

    def _settings(self, gcs: str, model: Path) -> dict[str, Any]:
        cores = sorted(os.sched_getaffinity(0))
        return {
            "name": "cut",
            "output_dir": str(self._directory),
            "model": {"path": str(model), "dtype": "float32", "max_model_len": 512},
            "ray": {"address": gcs},
            "engine": {
                "count": 2,
                "num_cpus": 1,
                "placement": {"strategy": "spread"},
                "cpu_cores": [str(cores[0]), str(cores[-1])],
                "num_kv_blocks": 200,
                "block_size": 32,
                "max_num_seqs": 4,
                "status_timeout_s": STATUS_TIMEOUT_S,
                "max_status_timeouts": NUM_TIMEOUTS,
            },
            "speculation": {"mode": "always", "num_speculative_tokens": 3},
            "server": {"port": 0, "progress_interval_s": 0.2},
        }

    def get(self, path: str) -> httpx.Response:
        """Of the server, from its own host."""
        return self.near.submit(lambda: httpx.get(self._url + path, timeout=30)).result(60)

    def post(self, body: dict[str, Any]) -> Future[dict[str, Any]]:
        def send() -> dict[str, Any]:
            answer = httpx.post(f"{self._url}/v1/rollouts", json=body, timeout=ANSWER_TIMEOUT_S)
            assert answer.status_code == 200, answer.text
            result: dict[str, Any] = answer.json()
            return result

        return self.near.submit(send)

    def serving(self) -> dict[str, dict[str, Any]]:
        """Engines that serve and whose status has been heard, by id."""
        return {
            engine["engine_id"]: engine
            for engine in self.get("/v1/engines").json()["engines"]
            if engine["state"] == "serving" and engine["pid"] is not None
        }

    def stop(self) -> None:
        assert self.near.end(self._server, STOP_TIMEOUT_S) == 0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    model = make_model(tmp_path / "model", seed=11)
    with two_hosts(tmp_path) as (near, far, cable):
        yield Service(near, far, cable, tmp_path, model)


def engine_processes(host: Host) -> list[psutil.Process]:
    """Actors, engine cores and workers."""
    return [p for p in host.processes() if p.name().startswith(("VLLM::", "ray::EngineAct"))]


def test_a_cut_engine_is_replaced_and_what_it_says_after_healing_is_for_nobody(
    service: Service,
) -> None:
    prompts = random_prompts(4, seed=4)
    num_cut = len(prompts) * NUM_REPEATS
    wait_until(lambda: len(service.serving()) == 2, START_TIMEOUT_S, "two engines to serve")
    calm = service.post(greedy_body("calm", prompts, NUM_TOKENS)).result(ANSWER_TIMEOUT_S)
    expected = tokens_of_whole(calm, len(prompts), NUM_TOKENS)
    before = service.serving()

    answer = service.post(greedy_body("cut", prompts * NUM_REPEATS, NUM_TOKENS))
    wait_until(
        lambda: all(e["num_running_reqs"] > 0 for e in service.serving().values()),
        START_TIMEOUT_S,
        "both engines to have work",
    )
    cut_processes = engine_processes(service.far)
    assert len(cut_processes) >= 2
    service.cable.cut()
    wait_until(lambda: len(service.serving()) == 1, START_TIMEOUT_S, "the cut engine to be missed")
    (left,) = service.serving()
    (lost,) = before.keys() - {left}
    # Still cut: what comes now comes from the engine that is left.
    result = answer.result(ANSWER_TIMEOUT_S)
    assert tokens_of_whole(result, num_cut, NUM_TOKENS) == expected * NUM_REPEATS
    assert metrics_of(service.get("/metrics").text)["generate_retries_total"] > 0
    during = service.post(greedy_body("during", prompts, NUM_TOKENS)).result(ANSWER_TIMEOUT_S)
    assert tokens_of_whole(during, len(prompts), NUM_TOKENS) == expected
    assert engines_of(during) == {left}
    assert all(p.is_running() for p in cut_processes), "nothing reaches them, and so they live"

    service.cable.join()
    wait_until(lambda: len(service.serving()) == 2, START_TIMEOUT_S, "the pool to be whole again")
    after = service.serving()
    (new,) = after.keys() - {left}
    assert new != lost
    assert after[new]["node_id"] == before[lost]["node_id"], "there is room nowhere else"
    _, alive = psutil.wait_procs(cut_processes, timeout=30)
    assert alive == [], "processes of the engine that was cut off"
    fetched = service.get("/v1/rollouts/cut").json()
    assert fetched["state"] == "finished"
    assert fetched["result"] == result, "a late answer changed what was delivered"
    again = service.post(greedy_body("after", prompts * 4, NUM_TOKENS)).result(ANSWER_TIMEOUT_S)
    assert tokens_of_whole(again, len(prompts) * 4, NUM_TOKENS) == expected * 4
    assert engines_of(again) == {left, new}
    check_books(service.get("/metrics").text, len(prompts) * (1 + NUM_REPEATS + 1 + 4))

    service.stop()
    for host in (service.near, service.far):
        wait_until(lambda host=host: engine_processes(host) == [], 30, f"engines on {host.name}")
        assert engine_files_of(host) == set()


def engine_files_of(host: Host) -> set[str]:
    """What engines leave, among what Ray has in the host's shared memory."""
    marks = ("psm_", "sem.mp-", "__KMP_REGISTERED_LIB_", "slipstream")
    return {name for name in host.shared_memory() if name.startswith(marks)}


def test_nothing_of_the_hosts_stays(tmp_path: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    names, files = network_names(), engine_files()
    with two_hosts(tmp_path) as (near, far, cable):
        sleep = far.run(["sleep", "300"], tmp_path / "log", dict(os.environ))
        wait_until(lambda: [p.name() for p in far.processes()] == ["sleep"], 30, "a process")
        (inside,) = far.processes()
        assert network_names() - names == {near.name, far.name}
        listener = far.submit(lambda: socket.create_server((far.address, 0))).result(30)
        with listener:
            address = listener.getsockname()
            assert reaches(near, address)
            cable.cut()
            assert not reaches(near, address)
            cable.join()
            assert reaches(near, address)
    assert network_names() == names
    assert left_by_engines(files) == set()
    assert not inside.is_running()
    assert sleep.poll() not in (None, 0)


def reaches(host: Host, address: tuple[str, int]) -> bool:
    """Whether a connection comes about."""

    def connect() -> bool:
        try:
            socket.create_connection(address, timeout=2).close()
        except OSError:
            return False
        return True

    return host.submit(connect).result(30)
