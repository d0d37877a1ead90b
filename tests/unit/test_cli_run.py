"""``slipstream run`` over stand-ins for server and trainer: order, failure, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

SERVER = '''
"""Answers /readyz; has a detached child, as Ray has."""
import argparse, json, os, pathlib, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from shared.config.loading import load_run_config
parser = argparse.ArgumentParser()
parser.add_argument("--config")
config = load_run_config(parser.parse_args().config, environment={})
if config.engine.seed == 13:
    sys.exit("no luck with this seed")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
server = HTTPServer(("127.0.0.1", 0), Handler)
sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
child = subprocess.Popen(sleeper, start_new_session=True)
(config.run_dir / "worker.pid").write_text(str(child.pid))
url = f"http://127.0.0.1:{server.server_port}"
record = {"url": url, "ray_address": "127.0.0.1:6379", "pid": os.getpid()}
(config.run_dir / "server.json").write_text(json.dumps(record))
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
'''
TRAINER = """
import argparse, json, sys, time
from shared.config.loading import load_run_config
parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--resume", action="store_true")
arguments = parser.parse_args()
config = load_run_config(arguments.config, environment={})
if config.trainer.num_steps == 0:
    sys.exit("nothing to train")
with (config.run_dir / "metrics.jsonl").open("a") as file:
    for step in range(1, config.trainer.num_steps + 1):
        record = {"step": step, "reward/mean": step / 10, "resume": arguments.resume,
                  "url": config.trainer.server_url, "ray": config.ray.address}
        file.write(json.dumps(record) + "\\n")
        file.flush()
        while config.seed == 99:
            time.sleep(0.1)
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A working directory in which ``python -m rollout_server`` and ``trainer`` are stand-ins."""
    # The report and the live view of the real trainer package stay reachable.
    extend = "from pkgutil import extend_path\n__path__ = extend_path(__path__, __name__)\n"
    for package, source in {"rollout_server": SERVER, "trainer": TRAINER}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(extend, encoding="utf-8")
        (tmp_path / package / "__main__.py").write_text(source, encoding="utf-8")
    return tmp_path


def start(workplace: Path, *settings: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    overrides = ["model.path=m", "name=job", "trainer.num_steps=2", *settings]
    return subprocess.Popen(
        [sys.executable, "-m", "shared.cli", "run", *options]
        + [part for item in overrides for part in ("--set", item)],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def nothing_is_left(run_dir: Path) -> bool:
    pids = [
        int((run_dir / "worker.pid").read_text()),
        json.loads((run_dir / "server.json").read_text())["pid"],
    ]
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_a_run_serves_trains_reports_and_leaves_nothing_behind(workplace: Path) -> None:
    process = start(workplace)
    output, errors = process.communicate(timeout=120)
    run_dir = workplace / "runs" / "job"
    assert process.returncode == 0, errors
    url = json.loads((run_dir / "server.json").read_text())["url"]
    assert [(r["step"], r["url"], r["ray"]) for r in metrics(run_dir)] == [
        (1, url, "127.0.0.1:6379"),
        (2, url, "127.0.0.1:6379"),
    ]
    assert "step 2  reward 0.200" in output
    assert "report:" in output
    assert (run_dir / "report.html").exists()
    served = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert served["weights"]["keep_on_stop"] is False, "the trainer's checkpoint is what is kept"
    assert (workplace / "runs" / "latest").resolve() == run_dir.resolve()
    assert nothing_is_left(run_dir)


def test_with_json_stdout_holds_the_summary_and_nothing_else(workplace: Path) -> None:
    process = start(workplace, options=("--json",))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    summary = workplace / "runs" / "job" / "summary.json"
    assert json.loads(output) == json.loads(summary.read_text())
    assert "step 2  reward 0.200" in errors


@pytest.mark.slow
def test_a_second_run_gets_its_own_directory_and_resume_takes_the_first(workplace: Path) -> None:
    for options in ((), (), ("--resume",)):
        process = start(workplace, options=options)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    runs = workplace / "runs"
    assert [record["resume"] for record in metrics(runs / "job")] == [False, False, True, True]
    assert [record["resume"] for record in metrics(runs / "job-2")] == [False, False]


def test_a_server_that_fails_to_start_shows_the_end_of_its_log(workplace: Path) -> None:
    process = start(workplace, "engine.seed=13")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no luck with this seed" in errors
    assert "Traceback" not in errors


def test_a_trainer_that_fails_shows_the_end_of_its_log(workplace: Path) -> None:
    process = start(workplace, "trainer.num_steps=0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "nothing to train" in errors
    assert nothing_is_left(workplace / "runs" / "job")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_everything_and_exits_with_130(
    workplace: Path, signum: signal.Signals
) -> None:
    process = start(workplace, "seed=99")
    run_dir = workplace / "runs" / "job"
    while not (run_dir / "metrics.jsonl").exists():  # bounded by the test's timeout
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert nothing_is_left(run_dir)


def test_a_server_that_never_gets_ready_is_given_up_with_the_reason(workplace: Path) -> None:
    (workplace / "rollout_server" / "__main__.py").write_text(
        "import time\nprint('loading for ever', flush=True)\ntime.sleep(300)\n", encoding="utf-8"
    )
    process = start(workplace, "engine.start_timeout_s=2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not ready after 2 s, waiting for server.json" in errors
    assert "loading for ever" in errors
