"""Chooses the draft length that makes the most tokens per second. Pure; time is passed in.

For each candidate ``K`` the mean acceptance length ``L(K)`` comes from the acceptance measured per
position and the seconds ``T(K)`` of a steady step from the corrected cost model; the rate is
``requests * L(K) / T(K)``. Plain decoding is the candidate ``K = 0``, so that switching off and
choosing a length are one decision.

Seconds spent on prompts are left out of ``T``: they are work of their own that every choice does
alike, and charging them to the tokens of the step would make long drafts look cheap.

A choice is left only for one that is better by a margin. Another length is tried for a few steps
if that is expected to win something: the mean of what it may be better by, over what its evidence
leaves open (expected improvement, as in Bayesian optimisation), over the steps until the next trial
and less what the trial itself loses, so that what is promising, unknown and cheap to find out comes
first, plain decoding included. Those steps are bounded to a share of all steps, but
for a few at the start and after a push, and carry their own reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import erf, exp, hypot, log, pi, sqrt

from rollout_server.speculation.acceptance import AcceptanceTracker, mean_acceptance_lengths
from rollout_server.speculation.correction import StepTimeCorrection
from rollout_server.speculation.part_factors import Parts
from rollout_server.speculation.steps import EngineLoadSample
from shared.types import SpeculationReason

EXPLORATION_STEPS = 4
"""Length of one trial: its first step still verifies the drafts of the choice before."""
FIRST_TRIALS = 3
"""Trials that an engine may make before it has earned any: what it starts from may be wrong."""
PUSH_TRIALS = 2
"""The same after weights were replaced."""
MIN_WIN_STEPS = 0.8
"""Steps' worth of tokens that a trial must be expected to win."""
RETRY_CREDIT = 0.25
"""Credit lost where no trial is worth it, so that the question is not asked at every step."""


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
        self._num_waiting_reqs = 0
        self._credit_steps = float(FIRST_TRIALS * EXPLORATION_STEPS)
        """Steps that may be spent on trials: earned step by step, spent trial by trial."""

    def weights_changed(self) -> None:
        """Trials may follow at once: what acceptance is now, nobody knows."""
        self._credit_steps = max(self._credit_steps, float(PUSH_TRIALS * EXPLORATION_STEPS))

    def choose(self, sample: EngineLoadSample, settings: ChoiceSettings) -> Choice:
        """Decide for the step that ``sample`` describes."""
        limit = settings.max_draft_length
        if sample.max_draft_tokens is not None:
            limit = min(limit, sample.max_draft_tokens)
        acceptance = self._acceptance.per_position()
        lengths = mean_acceptance_lengths(acceptance)
        requests = self._num_requests(sample)
        parts = self._correction.model.steady_parts_s(requests, sample.num_kv_tokens, limit)
        seconds = self._correction.unit_seconds(requests, parts, sample.time_s)
        rates = [requests * n / s for n, s in zip(lengths, seconds, strict=False)]
        chosen = self._exploit(rates, settings)
        trial = None
        if self._may_explore(settings, chosen) and requests == sample.num_decode_reqs:
            outlook = _Outlook(requests, parts, seconds, rates, lengths)
            trial = self._explore(outlook, sample, settings)
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

    def _num_requests(self, sample: EngineLoadSample) -> int:
        """Requests that the drafts of this step will be for.

        Those that have arrived since the last step are let in by this one, most likely, and then
        hold drafts too; those that were waiting already are not likely to get in now.
        """
        arrived = max(sample.num_waiting_reqs - self._num_waiting_reqs, 0)
        self._num_waiting_reqs = sample.num_waiting_reqs
        return max(sample.num_decode_reqs + arrived, 1)

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

    def _may_explore(self, settings: ChoiceSettings, chosen: int) -> bool:
        """Whether a trial is under way or could begin; counts the steps."""
        if self._phase is ChoicePhase.EXPLORING:
            self._trial_steps_left -= 1
            if self._trial_steps_left > 0 and self._trial != chosen:
                return True
            self._phase = ChoicePhase.EXPLOITING
            return False
        if settings.exploration_fraction <= 0:
            return False
        if self._credit_steps < EXPLORATION_STEPS:
            self._credit_steps += settings.exploration_fraction
        return self._credit_steps >= EXPLORATION_STEPS

    def _explore(
        self, outlook: _Outlook, sample: EngineLoadSample, settings: ChoiceSettings
    ) -> int | None:
        """The draft length on trial in this step; None: the choice itself."""
        if self._phase is ChoicePhase.EXPLORING:
            return self._trial
        trial = self._worth_a_trial(outlook, sample.time_s, settings)
        if trial is None:
            self._credit_steps -= RETRY_CREDIT
            return None
        self._phase = ChoicePhase.EXPLORING
        self._credit_steps -= EXPLORATION_STEPS
        self._trial = trial
        self._trial_steps_left = EXPLORATION_STEPS
        return trial

    def _worth_a_trial(
        self, outlook: _Outlook, now_s: float, settings: ChoiceSettings
    ) -> int | None:
        """The draft length whose trial is expected to win most, counted in steps of the choice."""
        chosen, rates, parts = self._chosen, outlook.rates, outlook.parts
        hopes = mean_acceptance_lengths(self._acceptance.optimistic_per_position(now_s))
        needed = rates[chosen] * (1 + settings.switch_margin)
        horizon_steps = EXPLORATION_STEPS / settings.exploration_fraction
        best_k, best_win = None, MIN_WIN_STEPS
        for k, rate in enumerate(rates):
            if k == chosen:
                continue
            of_time = self._correction.log_deviation(
                outlook.num_requests, parts[k], parts[chosen], k, now_s
            )
            deviation = hypot(of_time, log(hopes[k] / outlook.lengths[k]))
            gain = _expected_gain(log(rate / needed), deviation)
            slower = max(1 - rate / rates[chosen], 0.0)
            times_as_long = outlook.seconds[k] / outlook.seconds[chosen]
            win = gain * horizon_steps - EXPLORATION_STEPS * slower * times_as_long
            if win > best_win:
                best_k, best_win = k, win
        return best_k


def _expected_gain(mean: float, deviation: float) -> float:
    """Mean of the positive part of a normal distribution."""
    if deviation <= 0.0:
        return max(mean, 0.0)
    z = mean / deviation
    density = exp(-0.5 * z * z) / sqrt(2 * pi)
    return deviation * density + mean * 0.5 * (1 + erf(z / sqrt(2)))


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What is expected of each draft length."""

    num_requests: int
    parts: Sequence[Parts]
    seconds: Sequence[float]
    rates: Sequence[float]
    lengths: Sequence[float]
