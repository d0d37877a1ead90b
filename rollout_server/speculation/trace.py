"""Records what enters a speculation controller and what comes out, for replay. One JSON per line.

The first line is the controller's beginning; every later one is one call, in order. JSON keeps a
Python float exactly, so a replay sees the very numbers the engine saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import Field, TypeAdapter

from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepObservation,
)
from shared.config.base import SettingsModel
from shared.schemas.speculation import SpeculationPolicy

TRACE_FORMAT = 1


class TraceStart(SettingsModel):
    """A controller is made."""

    kind: Literal["start"] = "start"
    format: int = TRACE_FORMAT
    engine_id: str
    max_draft_length: int
    kv_capacity_tokens: int | None
    policy: SpeculationPolicy
    cost_model: CostModel
    cost_model_name: str


class TraceStep(SettingsModel):
    """A decision, and its confirmation after the step's slots were allocated.

    A step that schedules nothing (every request has just ended) decides and confirms nothing.
    """

    kind: Literal["step"] = "step"
    sample: EngineLoadSample
    decision: SpeculationDecision
    allocated_kv_cache_usage: float | None
    confirmed: SpeculationDecision | None


class TraceObservation(SettingsModel):
    """A step has finished."""

    kind: Literal["observation"] = "observation"
    time_s: float
    observation: StepObservation
    expected_s: float | None


class TracePolicy(SettingsModel):
    """The policy was changed."""

    kind: Literal["policy"] = "policy"
    policy: SpeculationPolicy


class TraceCostModel(SettingsModel):
    """A cost model was set."""

    kind: Literal["cost_model"] = "cost_model"
    cost_model: CostModel
    name: str


class TraceWeights(SettingsModel):
    """Weights were replaced."""

    kind: Literal["weights"] = "weights"


TraceEvent = Annotated[
    TraceStart | TraceStep | TraceObservation | TracePolicy | TraceCostModel | TraceWeights,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[TraceEvent] = TypeAdapter(TraceEvent)


class TraceWriter:
    """Appends events to a file, a buffer at a time: a step must not wait for a disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w", buffering=1 << 16)

    def write(self, event: SettingsModel) -> None:
        """Record an event that happens rarely."""
        self._file.write(event.model_dump_json() + "\n")

    def write_step(
        self,
        sample: EngineLoadSample,
        decision: SpeculationDecision,
        allocated_kv_cache_usage: float | None,
        confirmed: SpeculationDecision | None,
    ) -> None:
        """Record a decision, without the checks of a model: it happens at every step."""
        self._dump(
            {
                "kind": "step",
                "sample": asdict(sample),
                "decision": asdict(decision),
                "allocated_kv_cache_usage": allocated_kv_cache_usage,
                "confirmed": None if confirmed is None else asdict(confirmed),
            }
        )

    def write_observation(
        self, observation: StepObservation, time_s: float, expected_s: float | None
    ) -> None:
        """Record a finished step, likewise."""
        self._dump(
            {
                "kind": "observation",
                "time_s": time_s,
                "observation": asdict(observation),
                "expected_s": expected_s,
            }
        )

    def flush(self) -> None:
        self._file.flush()

    def _dump(self, event: dict[str, object]) -> None:
        self._file.write(json.dumps(event) + "\n")


def read_trace(path: Path) -> Iterator[TraceEvent]:
    """The events of a trace. A last line cut off by a kill is left out.

    Raises:
        ValueError: naming the line that is not an event, or the format that is not known.
    """
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                event = _EVENT.validate_json(line)
            except ValueError as exc:
                raise ValueError(f"{path}, line {number}: not a trace event: {exc}") from exc
            if isinstance(event, TraceStart) and event.format != TRACE_FORMAT:
                raise ValueError(
                    f"{path} has trace format {event.format}; this version reads {TRACE_FORMAT}"
                )
            yield event
