"""Policies side by side over one simulated engine and one set of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.simulated_load import SimulatedRequest
from rollout_server.speculation.simulation import SimulatedMachine, SimulationResult
from rollout_server.speculation.simulator import simulate
from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import SpeculationPolicy
from shared.types import SpeculationMode

SYSTEMATIC_ERROR = 1.5
"""By which the wrong calibration takes draft passes for cheaper than they are."""
HIGH_THRESHOLD = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """An engine and its drafter."""

    model: str
    device: str
    machine: SimulatedMachine
    acceptance: float
    """Conditional, the same at every position."""
    always_on_length: int
    max_draft_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A policy and what its controller believes."""

    name: str
    policy: SpeculationPolicy
    believed: CostModel | None


def policy(mode: SpeculationMode, num_speculative_tokens: int, **changes: Any) -> SpeculationPolicy:
    """The default policy in another mode."""
    config = SpeculationConfig.model_validate(
        {"mode": mode, "num_speculative_tokens": num_speculative_tokens, **changes}
    )
    fields = config.model_dump(include=set(SpeculationPolicy.model_fields))
    return SpeculationPolicy.model_validate(fields)


def with_cheap_drafts(model: CostModel, factor: float = SYSTEMATIC_ERROR) -> CostModel:
    """A calibration that is wrong: draft passes ``factor`` times too cheap."""
    draft = model.draft
    return model.model_copy(
        update={
            "draft": draft.model_copy(
                update={"values_s": tuple(value / factor for value in draft.values_s)}
            ),
            "draft_kv_s": model.draft_kv_s / factor,
        }
    )


def contenders(scenario: Scenario) -> list[Contender]:
    """Off and always-on first: the others are compared to them."""
    truth = scenario.machine.cost_model
    fixed, longest = scenario.always_on_length, scenario.max_draft_length
    adaptive = policy(SpeculationMode.ADAPTIVE, longest)
    high = policy(SpeculationMode.ADAPTIVE, longest, kv_cache_threshold=HIGH_THRESHOLD)
    return [
        Contender(name="off", policy=policy(SpeculationMode.OFF, fixed), believed=truth),
        Contender(name="always", policy=policy(SpeculationMode.ALWAYS, fixed), believed=truth),
        Contender(name="kv_gate", policy=policy(SpeculationMode.KV_GATE, fixed), believed=truth),
        Contender(name="adaptive", policy=adaptive, believed=truth),
        Contender(name="adaptive_conservative_start", policy=adaptive, believed=None),
        Contender(
            name="adaptive_wrong_calibration", policy=adaptive, believed=with_cheap_drafts(truth)
        ),
        Contender(name="adaptive_threshold_0.9", policy=high, believed=truth),
    ]


def compare(
    scenario: Scenario, lengths: str, requests: Sequence[SimulatedRequest], seed: int
) -> tuple[list[dict[str, Any]], dict[str, SimulationResult]]:
    """One point per policy, and the runs behind them."""
    runs = {
        contender.name: simulate(
            requests,
            scenario.machine,
            contender.policy,
            acceptance_per_pos=[scenario.acceptance],
            believed=contender.believed,
            max_draft_length=scenario.max_draft_length,
            seed=seed,
        )
        for contender in contenders(scenario)
    }
    points = [
        {
            "model": scenario.model,
            "device": scenario.device,
            "lengths": lengths,
            "policy": name,
            "speedup_over_off": round(runs["off"].time_s / run.time_s, 3),
            "speedup_over_always": round(runs["always"].time_s / run.time_s, 3),
            "time_s": round(run.time_s, 2),
            "num_steps": len(run.steps),
            "num_switches": run.num_switches,
            "num_preemptions": run.num_preemptions,
            "share_of_time_per_k": shares_of_time(run),
        }
        for name, run in runs.items()
    ]
    return points, runs


def shares_of_time(run: SimulationResult) -> dict[str, float]:
    """Share of the seconds spent at each draft length."""
    seconds: dict[int, float] = {}
    for step in run.steps:
        k = step.num_speculative_tokens
        seconds[k] = seconds.get(k, 0.0) + step.duration_s
    return {str(k): round(seconds[k] / run.time_s, 3) for k in sorted(seconds)}


def series(run: SimulationResult, num_points: int = 60) -> list[list[float]]:
    """Time, running requests, KV usage, K and tokens per second, averaged over equal stretches."""
    size = max(len(run.steps) // num_points, 1)
    rows = []
    for start in range(0, len(run.steps), size):
        stretch = run.steps[start : start + size]
        elapsed_s = sum(step.duration_s for step in stretch)
        rows.append(
            [
                round(stretch[0].time_s, 3),
                stretch[0].num_running_reqs,
                round(stretch[0].kv_cache_usage, 4),
                round(sum(s.num_speculative_tokens for s in stretch) / len(stretch), 2),
                round(sum(s.num_tokens for s in stretch) / elapsed_s, 1),
            ]
        )
    return rows
