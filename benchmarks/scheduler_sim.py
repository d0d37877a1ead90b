"""What would the speculation scheduler win on machines that are not at hand?

The same controller as in real engines, over simulated ones: one engine of 128 sequences (128
prompts x 8 samples over 8 engines, as the reference trains), with the published A100 figures as
the truth, and one of 16 for every calibration under ``deploy/calibration``. Speedups are of the
seconds until the last rollout is done, which is what a training step waits for.

Assumed: acceptance as the reference measured it (0.98 / 0.96 / 0.97 for 7B / 8B / 14B; 0.93 for
calibrated ones), the same at every position; prompts are prefilled in full; steps scatter by 5 %.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.published_costs import DEVICE, MODELS, published_cost_model
from benchmarks.harness.results import print_last_line, write_result
from benchmarks.harness.simulated_policies import Scenario, compare, policy, series
from rollout_server.speculation.calibration import DEFAULT_DIRECTORY, read_calibration
from rollout_server.speculation.controller import SpeculationController
from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.simulated_batch import SimulatedMemory
from rollout_server.speculation.simulated_load import (
    DISTRIBUTIONS,
    LengthDistribution,
    SimulatedRequest,
    read_recorded,
)
from rollout_server.speculation.simulation import SimulatedMachine
from rollout_server.speculation.steps import EngineLoadSample, StepObservation, StepShape
from shared.types import SpeculationMode

NUM_SEQUENCES = 128
STEP_NOISE = 0.05
MAX_DRAFT_LENGTH = 8
BLOCK_SIZE = 16
CALIBRATED_ACCEPTANCE = 0.93
CALIBRATED_MAX_DRAFT_LENGTH = 4
CALIBRATED_LENGTHS = (
    LengthDistribution(name="tail-256", median_tokens=64, sigma=0.9, max_tokens=256),
    LengthDistribution(name="tail-1k", median_tokens=200, sigma=1.0, max_tokens=1024),
)
NUM_TIMED_STEPS = 10_000


def published_scenarios() -> list[Scenario]:
    """The reference's figures, and the same with the KV reads that its sweeps were spared."""
    return [
        Scenario(
            model=model.name,
            device=DEVICE + (", distinct KV" if distinct_kv else ""),
            machine=SimulatedMachine(
                cost_model=published_cost_model(model, distinct_kv=distinct_kv)[0],
                memory=SimulatedMemory(
                    num_kv_blocks=model.num_kv_tokens // BLOCK_SIZE,
                    block_size=BLOCK_SIZE,
                    max_num_seqs=NUM_SEQUENCES,
                ),
                step_noise=STEP_NOISE,
            ),
            acceptance=model.acceptance,
            always_on_length=model.always_on_length,
            max_draft_length=MAX_DRAFT_LENGTH,
        )
        for model in MODELS
        for distinct_kv in (False, True)
    ]


def calibrated_scenarios(directory: Path) -> list[Scenario]:
    """Every calibration there is, at a size that its device can hold."""
    scenarios = []
    for path in sorted(directory.glob("*.json")):
        calibration = read_calibration(path)
        scenarios.append(
            Scenario(
                model=calibration.name,
                device=calibration.key.device,
                machine=SimulatedMachine(
                    cost_model=calibration.cost_model,
                    memory=SimulatedMemory(num_kv_blocks=4096, max_num_seqs=16),
                    step_noise=STEP_NOISE,
                ),
                acceptance=CALIBRATED_ACCEPTANCE,
                always_on_length=CALIBRATED_MAX_DRAFT_LENGTH,
                max_draft_length=CALIBRATED_MAX_DRAFT_LENGTH,
            )
        )
    return scenarios


def decision_cost_us(model: CostModel, num_reqs: int) -> dict[str, float]:
    """Medians of the microseconds a step costs: deciding and confirming, and observing."""
    controller = SpeculationController(
        policy(SpeculationMode.ADAPTIVE, MAX_DRAFT_LENGTH),
        max_draft_length=MAX_DRAFT_LENGTH,
        cost_model=model,
    )
    generator = random.Random(0)
    deciding, observing = [], []
    now_s = 0.0
    for step in range(NUM_TIMED_STEPS):
        sample = EngineLoadSample(
            time_s=now_s,
            kv_cache_usage=0.2,
            num_running_reqs=num_reqs,
            num_waiting_reqs=0,
            num_decode_reqs=num_reqs,
            num_kv_tokens=num_reqs * (2000 + step),
        )
        begun_s = time.perf_counter()
        decision = controller.confirm(controller.decide(sample), 0.2)
        deciding.append(time.perf_counter() - begun_s)
        k = decision.num_speculative_tokens
        shape = StepShape.steady(num_reqs, sample.num_kv_tokens, k)
        duration_s = model.step_s(shape) * generator.lognormvariate(0.0, STEP_NOISE)
        tried = tuple(round(num_reqs * 0.95**i) if i < k else 0 for i in range(MAX_DRAFT_LENGTH))
        observation = StepObservation(
            shape=shape,
            duration_s=duration_s,
            num_tried_per_pos=tried,
            num_accepted_per_pos=tuple(round(count * 0.95) for count in tried),
        )
        now_s += duration_s
        begun_s = time.perf_counter()
        controller.observe(observation, now_s)
        observing.append(time.perf_counter() - begun_s)
    return {
        "decide_us": round(statistics.median(deciding) * 1e6, 1),
        "observe_us": round(statistics.median(observing) * 1e6, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="JSONL, num_tokens.")
    parser.add_argument("--calibrations", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--models", nargs="*", help="Published models; by default all of them.")
    options = parser.parse_args()
    loads: list[tuple[str, list[SimulatedRequest]]] = [
        (lengths.name, lengths.sample(NUM_SEQUENCES, options.seed)) for lengths in DISTRIBUTIONS
    ]
    recorded = [(path.stem, read_recorded(path)) for path in options.recorded]
    calibrated_loads = [
        (lengths.name, lengths.sample(NUM_SEQUENCES, options.seed))
        for lengths in CALIBRATED_LENGTHS
    ]
    published = [s for s in published_scenarios() if s.model in (options.models or [s.model])]
    jobs = [(scenario, [*loads, *recorded]) for scenario in published]
    jobs += [
        (scenario, [*calibrated_loads, *recorded])
        for scenario in calibrated_scenarios(options.calibrations)
    ]
    points: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for scenario, scenario_loads in jobs:
        for name, requests in scenario_loads:
            found, runs = compare(scenario, name, requests, options.seed)
            points += found
            raw[f"{scenario.model}, {scenario.device}, {name}"] = series(runs["adaptive"])
            shown = {p["policy"]: p["speedup_over_off"] for p in found}
            print(f"{scenario.model}, {scenario.device}, {name}: {shown}", file=sys.stderr)
    model = published_cost_model(MODELS[0])[0]
    costs = {str(num_reqs): decision_cost_us(model, num_reqs) for num_reqs in (1, 64, 256)}
    result = {
        "bench": "scheduler_sim",
        "points": points,
        "decide_us": max(cost["decide_us"] for cost in costs.values()),
        "cost_us_per_num_reqs": costs,
    }
    write_result(result, {"adaptive_series": raw})
    print_last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
