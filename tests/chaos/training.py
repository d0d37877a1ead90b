"""Does a training run whose engines die come to what an undisturbed one comes to?

``make chaos-training``: the demo's training with two engines, over several seeds, each calm and
with an engine killed in every tenth step, in turn. Ends with one line of JSON, keeps it in
``benchmarks/results/chaos_training.json`` and draws the curves. With other prompts per step than
the demo's it is a measurement of its own, ``chaos_training_<prompts>_prompts.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil

from benchmarks.harness.results import print_last_line, write_result
from tests.chaos.engine_processes import core_of
from tests.chaos.training_curves import Curve, comparison, curve_of

ROOT = Path(__file__).parents[2]
CONFIG = "deploy/configs/demo.yaml"
PICTURE = ROOT / "docs" / "images" / "chaos-training.png"
STEP_TIMEOUT_S = 300.0
END_TIMEOUT_S = 120.0
DEMO_PROMPTS = 32
"""``trainer.prompts_per_step`` of ``CONFIG``."""
HIT_EVERY = 10
"""Steps."""


class TrainingRun:
    """One ``slipstream run``, as a user starts it."""

    def __init__(
        self, directory: Path, name: str, seed: int, num_steps: int, num_prompts: int
    ) -> None:
        self._seed = seed
        self._num_steps = num_steps
        self._metrics = directory / name / "metrics.jsonl"
        self._log = directory / f"{name}.log"
        settings = {
            "name": name,
            "output_dir": str(directory),
            "seed": seed,
            "engine.count": 2,
            "engine.cpu_cores": ["0", "1"],
            "engine.restart_budget": 100,
            "trainer.num_steps": num_steps,
            "trainer.prompts_per_step": num_prompts,
            "trainer.eval_every": 5,
            "trainer.checkpoint_every": 0,
        }
        sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shared.cli", "run", "--config", CONFIG, *sets],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def follow(self, steps_to_hit: Sequence[int]) -> Curve:
        """Until it ends; in each of these steps an engine is killed once."""
        choose = random.Random(self._seed)
        try:
            for step in steps_to_hit:
                self._await_step(step - 1)
                time.sleep(choose.uniform(0.0, 2.0))
                _kill_an_engine(self._process.pid, choose)
                print(f"seed {self._seed}: an engine killed in step {step}", file=sys.stderr)
            self._await_step(self._num_steps)
            code = self._process.wait(END_TIMEOUT_S)
            assert code == 0, f"exit code {code}: {self._log.read_text()[-3000:]}"
        finally:
            if self._process.poll() is None:
                self._process.terminate()
                self._process.wait(END_TIMEOUT_S)
        return curve_of(self._records(), self._seed, steps_to_hit)

    def _records(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _await_step(self, step: int) -> None:
        """Until it is done. The time limit starts anew with every step."""
        while True:
            done = len(self._records()) - 1  # the first line is of the evaluation before
            if done >= step:
                return
            self._await_another(done)

    def _await_another(self, done: int) -> None:
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while len(self._records()) - 1 <= done:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"waited {STEP_TIMEOUT_S} s for step {done + 1}"
            time.sleep(0.1)


def _kill_an_engine(run_pid: int, choose: random.Random) -> None:
    """Its actor, or the process in it that computes."""
    family = psutil.Process(run_pid).children(recursive=True)
    actors = [process for process in family if "EngineActor" in _name(process)]
    assert actors, "the run has no engine"
    actor = choose.choice(sorted(actors, key=lambda process: process.pid))
    (core_of(actor) if choose.random() < 0.5 else actor).kill()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def draw(calm: Sequence[Curve], hit: Sequence[Curve], path: Path) -> None:
    """Rewards by step: one thin line a run, the mean of each side in bold."""
    figure, axes = plt.subplots(figsize=(8, 4))
    for label, curves, colour in (("undisturbed", calm, "C0"), ("engines killed", hit, "C3")):
        for curve in curves:
            steps = range(1, len(curve.rewards) + 1)
            axes.plot(steps, curve.rewards, colour, alpha=0.35, linewidth=1)
            marked = [(step, curve.rewards[step - 1]) for step in curve.steps_hit]
            if marked:
                axes.plot(*zip(*marked, strict=True), "x", color=colour)
        means = [
            sum(values) / len(values) for values in zip(*(c.rewards for c in curves), strict=True)
        ]
        axes.plot(range(1, len(means) + 1), means, colour, linewidth=2.5, label=label)
    axes.set(xlabel="step", ylabel="mean reward", title="Training while engines die (x: a kill)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts-per-step", type=int, default=DEMO_PROMPTS)
    options = parser.parse_args()
    steps_to_hit = list(range(HIT_EVERY // 2, options.steps + 1, HIT_EVERY))
    calm: list[Curve] = []
    hit: list[Curve] = []
    with tempfile.TemporaryDirectory(prefix="slipstream-chaos-training-") as place:
        for seed in options.seeds:
            for name, steps, curves in (("calm", [], calm), ("hit", steps_to_hit, hit)):
                prompts = options.prompts_per_step
                run = TrainingRun(Path(place), f"{name}-{seed}", seed, options.steps, prompts)
                curves.append(run.follow(steps))
                took_s = sum(curves[-1].durations_s)
                print(
                    f"{name}, seed {seed}: {took_s:.0f} s, accuracy "
                    f"{curves[-1].accuracies[0][1]:.3f} to {curves[-1].final_accuracy:.3f}",
                    file=sys.stderr,
                )
    name = "chaos_training"
    if options.prompts_per_step == DEMO_PROMPTS:
        draw(calm, hit, PICTURE)
    else:
        name += f"_{options.prompts_per_step}_prompts"
    result = {"bench": name, **comparison(calm, hit)}
    raw = {
        name: [{"seed": c.seed, "rewards": c.rewards, "accuracies": c.accuracies,
                "durations_s": c.durations_s, "steps_hit": c.steps_hit} for c in curves]
        for name, curves in (("calm", calm), ("hit", hit))
    }  # fmt: skip
    write_result(result, raw)
    print_last_line(result)
    return 0 if result["within_seed_noise"] else 1


if __name__ == "__main__":
    sys.exit(main())
