"""Chooses the draft length that makes the most tokens per second. Pure; time is passed in.

For each candidate ``K`` the mean acceptance length ``L(K)`` comes from the acceptance measured per
position and the seconds ``T(K)`` of a steady step from the corrected cost model; the rate is
``requests * L(K) / T(K)``. Plain decoding is the candidate ``K = 0``, so that switching off and
choosing a length are one decision.

Seconds spent on prompts are left out of ``T``: they are work of their own that every choice does
alike, and charging them to the tokens of the step would make long drafts look cheap.

A choice is left only for one that is better by a margin. What has not been tried lately is tried
again for a few steps if, at the best its evidence allows, it would win; those steps are bounded to
a share of all steps and carry their own reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import exp

from rollout_server.speculation.acceptance import AcceptanceTracker, mean_acceptance_lengths
from rollout_server.speculation.correction import StepTimeCorrection
from rollout_server.speculation.steps import EngineLoadSample
from shared.types import SpeculationReason

EXPLORATION_STEPS = 4
"""Length of one trial: its first step still verifies the drafts of the choice before."""
UNTRIED_TIME_SHARE = 0.12
"""Share by which an unmeasured step may be faster than the model says."""
KNOWN_STEPS = 8.0
"""Measured steps after which that share has halved."""


class ChoicePhase(StrEnum):
    """What the choice is doing. EXPLOITING -> EXPLORING -> EXPLOITING, nothing else."""

    EXPLOITING = "exploiting"
    EXPLORING = "exploring"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceSettings:
    """The part of the policy that the choice follows."""

    max_draft_length: int
    min_speedup: float
    """Speculation begins where its predicted rate over plain decoding is at least this."""
    switch_margin: float
    """Another draft length must be better by this share."""
    exploration_fraction: float
    """Share of steps that may be spent on trials; 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A draft length and what is expected of it."""

    num_speculative_tokens: int
    reason: SpeculationReason
    predicted_tokens_per_s: float
    predicted_speedup: float


class DraftLengthChoice:
    """One engine's choice under an open gate."""

    def __init__(self, correction: StepTimeCorrection, acceptance: AcceptanceTracker) -> None:
        self._correction = correction
        self._acceptance = acceptance
        self._phase = ChoicePhase.EXPLOITING
        self._chosen = 0
        self._trial = 0
        self._trial_steps_left = 0
        self._credit_steps = 0.0
        """Steps that may be spent on trials: earned step by step, spent trial by trial."""

    def weights_changed(self) -> None:
        """A trial may follow at once: what acceptance is now, nobody knows."""
        self._credit_steps = max(self._credit_steps, float(EXPLORATION_STEPS))

    def choose(self, sample: EngineLoadSample, settings: ChoiceSettings) -> Choice:
        """Decide for the step that ``sample`` describes."""
        limit = settings.max_draft_length
        if sample.max_draft_tokens is not None:
            limit = min(limit, sample.max_draft_tokens)
        lengths = mean_acceptance_lengths(self._acceptance.per_position())
        rates = self._rates(sample, lengths, limit)
        chosen = self._exploit(rates, settings)
        trial = self._explore(sample, settings, rates, chosen)
        length = chosen if trial is None else min(trial, limit)
        if trial is not None:
            reason = SpeculationReason.EXPLORING
        elif length:
            reason = SpeculationReason.PREDICTED_FASTER
        else:
            reason = SpeculationReason.PREDICTED_SLOWER
        return Choice(
            num_speculative_tokens=length,
            reason=reason,
            predicted_tokens_per_s=rates[length] / self._correction.machine_factor,
            predicted_speedup=rates[length] / rates[0],
        )

    def _rates(
        self,
        sample: EngineLoadSample,
        lengths: Sequence[float],
        limit: int,
    ) -> list[float]:
        """Tokens per second at each draft length, the machine factor (common to all) left out."""
        requests = max(sample.num_decode_reqs, 1)
        correction, model = self._correction, self._correction.model
        rates = []
        for k in range(limit + 1):
            seconds = model.steady_step_s(requests, sample.num_kv_tokens, k)
            residual = correction.log_residual(requests, k, sample.time_s)
            rates.append(requests * lengths[k] / (seconds * exp(residual)))
        return rates

    def _exploit(self, rates: Sequence[float], settings: ChoiceSettings) -> int:
        chosen = min(self._chosen, len(rates) - 1)
        best = max(range(len(rates)), key=rates.__getitem__)
        if chosen == 0:
            better = rates[best] >= rates[0] * settings.min_speedup
        elif rates[chosen] < rates[0]:
            better = True  # plain decoding needs no margin to be gone back to
        else:
            better = rates[best] >= rates[chosen] * (1 + settings.switch_margin)
        if better:
            chosen = best
        self._chosen = chosen
        return chosen

    def _explore(
        self,
        sample: EngineLoadSample,
        settings: ChoiceSettings,
        rates: Sequence[float],
        chosen: int,
    ) -> int | None:
        """The draft length on trial in this step; None: the choice itself."""
        if self._phase is ChoicePhase.EXPLORING:
            self._trial_steps_left -= 1
            if self._trial_steps_left > 0 and self._trial != chosen:
                return self._trial
            self._phase = ChoicePhase.EXPLOITING
            return None
        self._credit_steps = min(
            self._credit_steps + settings.exploration_fraction, float(EXPLORATION_STEPS)
        )
        if settings.exploration_fraction <= 0 or self._credit_steps < EXPLORATION_STEPS:
            return None
        trial = self._worth_a_trial(sample, settings, rates, chosen)
        if trial is None:
            return None
        self._phase = ChoicePhase.EXPLORING
        self._credit_steps = 0.0
        self._trial = trial
        self._trial_steps_left = EXPLORATION_STEPS
        return trial

    def _worth_a_trial(
        self,
        sample: EngineLoadSample,
        settings: ChoiceSettings,
        rates: Sequence[float],
        chosen: int,
    ) -> int | None:
        """Whatever would win by most if everything not known about it were at its best."""
        now, requests = sample.time_s, max(sample.num_decode_reqs, 1)
        hopes = mean_acceptance_lengths(self._acceptance.optimistic_per_position(now))
        means = mean_acceptance_lengths(self._acceptance.per_position())
        needed = rates[chosen] * (1 + settings.switch_margin)
        found: tuple[float, int] | None = None
        for k, rate in enumerate(rates):
            if k == chosen:
                continue
            known = self._correction.num_recent_steps(requests, k, now)
            faster = 1 - UNTRIED_TIME_SHARE / (1 + known / KNOWN_STEPS)
            hope = rate * hopes[k] / (means[k] * faster)
            if hope > needed and (found is None or hope > found[0]):
                found = (hope, k)
        return None if found is None else found[1]
