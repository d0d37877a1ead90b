"""One engine's speculation, as its scheduler drives it: controller, recorder and trace together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rollout_server.speculation.controller import SpeculationController
from rollout_server.speculation.cost_model import CostModel, conservative_model
from rollout_server.speculation.policy import apply_patch, initial_policy
from rollout_server.speculation.recorder import SpeculationRecorder
from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepObservation,
    StepShape,
)
from rollout_server.speculation.sweep import Sweep
from rollout_server.speculation.trace import (
    TraceCostModel,
    TracePolicy,
    TraceStart,
    TraceWeights,
    TraceWriter,
)
from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch

CONSERVATIVE = "conservative"
"""Name of the rule that stands in for a cost model where nobody has measured."""


class SpeculationDriver:
    """Decides, learns, remembers. Lives in the engine core's thread."""

    def __init__(
        self, engine_id: str, config: SpeculationConfig, *, kv_capacity_tokens: int | None
    ) -> None:
        num_positions = config.reserved_speculative_tokens
        policy = initial_policy(config)
        model = conservative_model()
        self._cost_model_name = CONSERVATIVE
        self.controller = SpeculationController(
            policy,
            max_draft_length=num_positions,
            kv_capacity_tokens=kv_capacity_tokens,
            cost_model=model,
        )
        self.recorder = SpeculationRecorder(engine_id, config.history_size, num_positions)
        self._num_positions = num_positions
        self._tried = [0] * num_positions
        self._accepted = [0] * num_positions
        self._sweep: Sweep | None = None
        self._unconfirmed: tuple[EngineLoadSample, SpeculationDecision] | None = None
        self._trace: TraceWriter | None = None
        if config.trace_directory is not None:
            self._trace = TraceWriter(Path(config.trace_directory) / f"{engine_id}.jsonl")
            self._trace.write(
                TraceStart(
                    engine_id=engine_id,
                    max_draft_length=num_positions,
                    kv_capacity_tokens=kv_capacity_tokens,
                    policy=policy,
                    cost_model=model,
                    cost_model_name=CONSERVATIVE,
                )
            )

    def decide(self, sample: EngineLoadSample) -> SpeculationDecision:
        """Before the step's KV slots are allocated: what to reserve them for."""
        if self._sweep is not None:
            return self._sweep.decide(sample)
        self._trace_unconfirmed()
        decision = self.controller.decide(sample)
        self._unconfirmed = sample, decision
        return decision

    def confirm(
        self,
        sample: EngineLoadSample,
        decision: SpeculationDecision,
        kv_cache_usage: float,
        unix_time_s: float,
    ) -> SpeculationDecision:
        """After they were: what the step does."""
        if self._sweep is not None:
            return decision
        self._unconfirmed = None
        confirmed = self.controller.confirm(decision, kv_cache_usage)
        if self._trace is not None:
            self._trace.write_step(sample, decision, kv_cache_usage, confirmed)
        self.recorder.record_step(unix_time_s, sample, confirmed)
        return confirmed

    def count_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """One request's drafts were verified in the step that is being finished."""
        self.recorder.record_draft(num_draft_tokens, num_accepted_tokens)
        for position in range(min(num_accepted_tokens + 1, num_draft_tokens)):
            self._tried[position] += 1
        for position in range(num_accepted_tokens):
            self._accepted[position] += 1

    def finish_step(self, shape: StepShape, duration_s: float, time_s: float) -> None:
        """A step is over; its drafts have been counted."""
        observation = StepObservation(
            shape=shape,
            duration_s=duration_s,
            num_tried_per_pos=tuple(self._tried),
            num_accepted_per_pos=tuple(self._accepted),
        )
        if any(self._tried):
            self._tried = [0] * self._num_positions
            self._accepted = [0] * self._num_positions
        if self._sweep is not None:
            self._sweep.observe(shape, duration_s)
            return
        self._trace_unconfirmed()
        expected_s = self.controller.observe(observation, time_s)
        self.recorder.record_finished_step(observation, expected_s)
        if self._trace is not None:
            self._trace.write_observation(observation, time_s, expected_s)

    def patch(self, patch: SpeculationPatch) -> None:
        """Take effect at the next step."""
        self._trace_unconfirmed()
        policy = apply_patch(self.controller.policy, patch)
        self.controller.set_policy(policy)
        if self._trace is not None:
            self._trace.write(TracePolicy(policy=policy))

    def set_cost_model(self, model: CostModel, name: str) -> None:
        """Use this calibration from the next step on."""
        self._trace_unconfirmed()
        self.controller.set_cost_model(model)
        self._cost_model_name = name
        if self._trace is not None:
            self._trace.write(TraceCostModel(cost_model=model, name=name))

    def begin_sweep(self, draft_lengths: Sequence[int], steps_each: int) -> None:
        """Measure: go through these draft lengths in turn, whatever the policy says."""
        self._sweep = Sweep(draft_lengths, steps_each)

    def end_sweep(self) -> list[tuple[StepShape, float]]:
        """Back to the policy; the steps that were measured, with their seconds."""
        steps = [] if self._sweep is None else self._sweep.steps
        self._sweep = None
        return steps

    def weights_changed(self) -> None:
        """Target or drafter was replaced."""
        self._trace_unconfirmed()
        self.controller.weights_changed()
        if self._trace is not None:
            self._trace.write(TraceWeights())

    def _trace_unconfirmed(self) -> None:
        """Record a decision whose step scheduled nothing: it moved the controller all the same."""
        if self._trace is not None and self._unconfirmed is not None:
            self._trace.write_step(*self._unconfirmed, None, None)
        self._unconfirmed = None

    def acceptance_per_pos(self) -> Sequence[float]:
        """Conditional acceptance, [max_num_speculative_tokens]."""
        return self.controller.acceptance.per_position()

    def report(self, since_step: int, kv_cache_usage: float) -> EngineSpeculation:
        """Everything, and the remembered steps after ``since_step``."""
        if self._trace is not None:
            self._trace.flush()
        predicts = self._cost_model_name != CONSERVATIVE
        return self.recorder.report(
            since_step,
            kv_cache_usage,
            acceptance_per_pos=list(self.acceptance_per_pos()),
            num_acceptance_changes=self.controller.acceptance.num_changes_noticed,
            cost_model=self._cost_model_name,
            # The rule's unit is a plain step, not a second: its factor says nothing.
            machine_factor=self.controller.correction.machine_factor if predicts else 1.0,
        )
