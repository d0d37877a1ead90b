"""Runs a recorded trace through the controller again. Pure.

With nothing changed every decision comes out as recorded, or the controller is not deterministic.
With changed settings it shows where they would have decided otherwise; the observations stay those
of the recorded run, so what would have come of the other decisions is for the simulator to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rollout_server.speculation.controller import SpeculationController
from rollout_server.speculation.policy import apply_patch
from rollout_server.speculation.trace import (
    TraceCostModel,
    TraceEvent,
    TraceObservation,
    TracePolicy,
    TraceStart,
    TraceStep,
    TraceWeights,
)
from shared.schemas.speculation import SpeculationPatch, SpeculationPolicy
from shared.types import SpeculationReason

MAX_DIFFERENCES_KEPT = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayDifference:
    """A step decided otherwise than recorded."""

    step: int
    num_running_reqs: int
    recorded: int
    recorded_reason: SpeculationReason
    replayed: int
    replayed_reason: SpeculationReason


@dataclass(kw_only=True, slots=True)
class ReplayReport:
    """What came out."""

    engine_id: str
    num_steps: int = 0
    num_different: int = 0
    steps_per_k_recorded: Counter[int] = field(default_factory=Counter)
    steps_per_k_replayed: Counter[int] = field(default_factory=Counter)
    steps_per_reason_replayed: Counter[SpeculationReason] = field(default_factory=Counter)
    first_differences: list[ReplayDifference] = field(default_factory=list)


def replay(events: Iterable[TraceEvent], changes: SpeculationPatch | None = None) -> ReplayReport:
    """Rerun the decisions, with ``changes`` to the policy in force throughout.

    Raises:
        ValueError: the trace does not begin with its controller's beginning.
    """
    controller: SpeculationController | None = None
    report: ReplayReport | None = None

    def changed(policy: SpeculationPolicy) -> SpeculationPolicy:
        return policy if changes is None else apply_patch(policy, changes)

    for event in events:
        if isinstance(event, TraceStart):
            controller = SpeculationController(
                changed(event.policy),
                max_draft_length=event.max_draft_length,
                kv_capacity_tokens=event.kv_capacity_tokens,
                cost_model=event.cost_model,
            )
            report = report or ReplayReport(engine_id=event.engine_id)
            continue
        if controller is None or report is None:
            raise ValueError("the trace does not begin with a start event: is it a whole file?")
        match event:
            case TraceStep():
                _replay_step(controller, event, report)
            case TraceObservation():
                controller.observe(event.observation, event.time_s)
            case TracePolicy():
                controller.set_policy(changed(event.policy))
            case TraceCostModel():
                controller.set_cost_model(event.cost_model)
            case TraceWeights():
                controller.weights_changed()
    if report is None:
        raise ValueError("the trace is empty")
    return report


def _replay_step(controller: SpeculationController, event: TraceStep, report: ReplayReport) -> None:
    decision = controller.decide(event.sample)
    if event.confirmed is None or event.allocated_kv_cache_usage is None:
        return  # the step scheduled nothing
    confirmed = controller.confirm(decision, event.allocated_kv_cache_usage)
    report.num_steps += 1
    recorded = event.confirmed
    report.steps_per_k_recorded[recorded.num_speculative_tokens] += 1
    report.steps_per_k_replayed[confirmed.num_speculative_tokens] += 1
    report.steps_per_reason_replayed[confirmed.reason] += 1
    if confirmed == recorded:
        return
    report.num_different += 1
    if len(report.first_differences) < MAX_DIFFERENCES_KEPT:
        report.first_differences.append(
            ReplayDifference(
                step=report.num_steps,
                num_running_reqs=event.sample.num_running_reqs,
                recorded=recorded.num_speculative_tokens,
                recorded_reason=recorded.reason,
                replayed=confirmed.num_speculative_tokens,
                replayed_reason=confirmed.reason,
            )
        )
