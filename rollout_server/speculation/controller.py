"""The speculation controller: raw facts in, a draft length and a reason out. Pure, no clock.

The KV gate (``gate.py``) always holds, except in the modes ``off`` and ``always``. Under an open
gate the mode ``kv_gate`` drafts a fixed length and ``adaptive`` asks the cost model
(``draft_length.py``). Everything that enters goes through the methods below, in an order that a
trace can record and a replay repeat (``trace.py``).
"""

from __future__ import annotations

from rollout_server.speculation.acceptance import AcceptanceTracker, mean_acceptance_lengths
from rollout_server.speculation.correction import StepTimeCorrection
from rollout_server.speculation.cost_model import CostModel, conservative_model
from rollout_server.speculation.draft_length import ChoiceSettings, DraftLengthChoice
from rollout_server.speculation.gate import GateState, KvGate
from rollout_server.speculation.steps import (
    EngineLoadSample,
    SpeculationDecision,
    StepObservation,
)
from shared.schemas.speculation import SpeculationPolicy
from shared.types import SpeculationMode, SpeculationReason


class SpeculationController:
    """One engine's decisions. Not thread-safe: it lives in the engine core's step."""

    def __init__(
        self,
        policy: SpeculationPolicy,
        *,
        max_draft_length: int,
        kv_capacity_tokens: int | None = None,
        cost_model: CostModel | None = None,
    ) -> None:
        """
        Args:
            max_draft_length: what the engine reserves KV slots for.
            kv_capacity_tokens: the engine's KV slots, for a threshold given in tokens.
            cost_model: of this device and model; without one, a conservative rule.
        """
        self._policy = policy
        self._kv_capacity_tokens = kv_capacity_tokens
        self._gate = KvGate()
        self.acceptance = AcceptanceTracker(max_draft_length)
        self.set_cost_model(cost_model or conservative_model())

    @property
    def policy(self) -> SpeculationPolicy:
        return self._policy

    @property
    def gate_is_open(self) -> bool:
        """Whether the last decision found the gate open."""
        return self._gate.state is GateState.OPEN

    def set_policy(self, policy: SpeculationPolicy) -> None:
        """Take effect at the next decision; the gate keeps its state."""
        self._policy = policy

    def set_cost_model(self, cost_model: CostModel) -> None:
        """Another calibration; what was corrected of the old one is forgotten."""
        self.correction = StepTimeCorrection(cost_model)
        self._choice = DraftLengthChoice(self.correction, self.acceptance)

    def weights_changed(self) -> None:
        """Target or drafter was replaced."""
        self.acceptance.weights_changed()
        self._choice.weights_changed()

    def observe(self, observation: StepObservation, time_s: float) -> float | None:
        """Learn from a finished step; the seconds that were expected of it.

        None for steps that prefill: prompts are not predicted.
        """
        self.acceptance.observe(
            observation.num_tried_per_pos, observation.num_accepted_per_pos, time_s
        )
        shape = observation.shape
        if shape.num_prefill_tokens or not shape.num_decode_reqs:
            return None
        expected_s = self.correction.predicted_step_s(shape, time_s)
        self.correction.observe(shape, observation.duration_s, time_s)
        return expected_s

    def decide(self, sample: EngineLoadSample) -> SpeculationDecision:
        """Advance one step and decide for it."""
        policy = self._policy
        gate_reason = self._advance_gate(sample.kv_cache_usage)
        if policy.mode is SpeculationMode.OFF:
            return _no_draft(SpeculationReason.MODE_OFF)
        if not sample.drafter_is_current:
            return _no_draft(SpeculationReason.STALE_DRAFTER)
        if policy.mode is not SpeculationMode.ALWAYS and self._gate.state is GateState.CLOSED:
            return _no_draft(gate_reason)
        if sample.max_draft_tokens == 0:
            return _no_draft(SpeculationReason.NO_ROOM)
        if policy.mode is SpeculationMode.ADAPTIVE:
            return self._choose(sample)
        length = policy.num_speculative_tokens
        if sample.max_draft_tokens is not None:
            length = min(length, sample.max_draft_tokens)
        is_always = policy.mode is SpeculationMode.ALWAYS
        return SpeculationDecision(
            num_speculative_tokens=length,
            reason=SpeculationReason.MODE_ALWAYS if is_always else gate_reason,
        )

    def confirm(self, decision: SpeculationDecision, kv_cache_usage: float) -> SpeculationDecision:
        """The decision, unless the step turned out to fill the KV cache to the threshold.

        Args:
            kv_cache_usage: after the step's slots were allocated and waiting requests let in.
        """
        if decision.num_speculative_tokens == 0 or self._policy.mode is SpeculationMode.ALWAYS:
            return decision
        if kv_cache_usage < self._threshold():
            return decision
        return _no_draft(self._advance_gate(kv_cache_usage))

    def min_survival(self, num_reqs: int, num_kv_tokens: int, num_speculative_tokens: int) -> float:
        """Chance of being accepted below which a draft is not worth a row of the target pass.

        A row that is accepted saves its share of the seconds a token costs now; below that the
        seconds it takes are better spent otherwise.
        """
        k, model = num_speculative_tokens, self.correction.model
        if k == 0 or num_reqs == 0:
            return 0.0
        steady_s = model.steady_step_s(num_reqs, num_kv_tokens, k)
        drafts_s = k * model.draft_pass_s(num_reqs, num_kv_tokens)
        plain_s = model.steady_step_s(num_reqs, num_kv_tokens, 0)
        row_s = max(steady_s - drafts_s - plain_s, 0.0) / (num_reqs * k)
        length = mean_acceptance_lengths(self.acceptance.per_position())[k]
        return row_s * num_reqs * length / steady_s

    def _choose(self, sample: EngineLoadSample) -> SpeculationDecision:
        policy = self._policy
        choice = self._choice.choose(
            sample,
            ChoiceSettings(
                max_draft_length=policy.num_speculative_tokens,
                min_speedup=policy.min_speedup,
                switch_margin=policy.switch_margin,
                exploration_fraction=policy.exploration_fraction,
            ),
        )
        return SpeculationDecision(
            num_speculative_tokens=choice.num_speculative_tokens,
            reason=choice.reason,
            predicted_tokens_per_s=choice.predicted_tokens_per_s,
            predicted_speedup=choice.predicted_speedup,
        )

    def _advance_gate(self, kv_cache_usage: float) -> SpeculationReason:
        policy = self._policy
        return self._gate.advance(
            kv_cache_usage,
            threshold=self._threshold(),
            hysteresis=policy.kv_cache_hysteresis,
            min_dwell_steps=policy.min_dwell_steps,
        )

    def _threshold(self) -> float:
        """As a fraction of the engine's KV slots."""
        tokens = self._policy.kv_cache_threshold_tokens
        if tokens is None or not self._kv_capacity_tokens:
            return self._policy.kv_cache_threshold
        return min(tokens / self._kv_capacity_tokens, 1.0)


def _no_draft(reason: SpeculationReason) -> SpeculationDecision:
    return SpeculationDecision(num_speculative_tokens=0, reason=reason)
