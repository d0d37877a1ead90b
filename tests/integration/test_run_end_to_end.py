"""``slipstream run`` as a user types it: model, server, trainer, report; resumed; stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.server_process import engine_files, left_by_engines

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

RUN_TIMEOUT_S = 300
STOP_TIMEOUT_S = 90
ROOT = Path(__file__).parents[2]


def write_config(directory: Path, **trainer: Any) -> Path:
    settings = {
        "name": "short",
        "output_dir": str(directory / "runs"),
        "model": {
            "path": str(directory / "model"),
            "dtype": "float32",
            "max_model_len": 128,
        },
        "demo_model": {"preset": "micro", "warm_start_steps": 20},
        "engine": {"num_kv_blocks": 64, "block_size": 32, "max_num_seqs": 32},
        "speculation": {"kv_cache_threshold": 0.3, "num_speculative_tokens": 2},
        "server": {"port": 0},
        "trainer": {
            "device": "cpu",
            "num_steps": 2,
            "prompts_per_step": 8,
            "group_size": 4,
            "eval_every": 0,
            "eval_prompts": 8,
            "checkpoint_every": 1,
            "sampling": {"max_tokens": 32},
            "optimizer": {"learning_rate": 1e-4},
            "task": {"kind": "arithmetic", "num_terms": [2, 2], "max_operand": 4},
            # Sure to tell samples of an untrained policy apart, so that every step trains.
            "reward": {"name": "how_long"},
            **trainer,
        },
        "scoring": {"rewards": {"how_long": "tests.fakes.rewards:length"}},
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shared.cli", "run", "--config", str(config), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_pushes_reports_and_can_be_resumed(tmp_path: Path) -> None:
    before = engine_files()
    process = start(write_config(tmp_path))
    output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, output[-3000:]
    run = tmp_path / "runs" / "short"
    steps = [line for line in metrics(run) if line["step"] > 0]
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["weights/version"] for line in steps] == [1, 2]
    assert max(line["policy/max_logprob_diff"] for line in steps) < 1e-3
    assert sum(line["rollout/num_draft_tokens"] for line in steps) > 0
    samples = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len({sample["id"] for sample in samples}) == len(samples) == 2 * 8 * 4
    for sample in samples:
        assert {span["version"] for span in sample["weight_versions"]} == {sample["step"] - 1}
    assert (run / "report.html").stat().st_size > 10_000
    assert {path.name for path in (run / "plots").iterdir()} >= {"reward.png", "speculation.png"}
    assert json.loads((run / "summary.json").read_text())["weight_version"] == 2

    # It goes on ahead of itself: step 4 is sampled while step 3 trains.
    process = start(write_config(tmp_path, num_steps=4, batches_ahead=1), "--resume")
    output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, output[-3000:]
    assert [line["step"] for line in metrics(run) if line["step"] > 0] == [1, 2, 3, 4]
    assert metrics(run)[-1]["weights/version"] > 2, "versions are never used twice"
    assert [line["lag/max"] for line in metrics(run) if line["step"] > 0] == [0, 0, 0, 1]
    assert sum(line["batch/num_stale"] for line in metrics(run) if line["step"] > 0) == 0
    assert left_by_engines(before) == set()


def test_control_c_leaves_nothing_behind(tmp_path: Path) -> None:
    before = engine_files()
    process = start(write_config(tmp_path, num_steps=1000))
    run = tmp_path / "runs" / "short"
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "no training step within the time"
        time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 130, output[-3000:]
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == [], "processes left behind"
    assert left_by_engines(before) == set(), "shared memory left behind"
    assert not (run / "server.json").exists()
