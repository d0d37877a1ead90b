"""Which part of a step the cost model gets wrong: machine, drafts or verification. Pure.

A step's seconds are ``machine * (plain + drafts * draft passes + verification * what it adds)``,
and the logarithms of the three factors are tracked by a Kalman filter, linearised at its estimate.
It knows what it does not know: a batch that always drafts four tokens cannot tell a slow machine
from slow draft passes, so the variance along that direction stays, and with it the reason to try
another draft length. Whatever is learned at one draft length and one batch size holds at all.

The machine factor may change at any time and takes over what is new. The other two belong to the
device and move slowly. Surprises of a lasting sign are a machine that has changed: its variance is
then raised, so that a few steps suffice. A surprise is never taken for more than ``MAX_DEVIATIONS``
of what was thought possible, so that one stalled step moves nothing far.
"""

from __future__ import annotations

from math import exp, log, sqrt

FIRST_MACHINE_VARIANCE = 25.0
"""Before the first step nothing is known of the machine, not even the model's unit."""
MACHINE_DRIFT = 1e-4
"""Variance that the machine factor gains per step."""
PART_DRIFT_PER_S = 2e-5
"""Variance that the other factors gain per second, up to what they began with."""
MAX_DEVIATIONS = 2.5
LASTING_GAIN = 0.2
"""Weight of the latest surprise in their mean; five steps of one sign make it lasting."""
LASTING_DEVIATIONS = 1.2
"""Mean surprise, in deviations, that no chance explains."""
CHANGED_MACHINE_VARIANCE = 0.1
"""Variance given back to the machine factor then."""
FIRST_NOISE = 0.01
"""Variance of a step's log seconds, until it has been measured."""
NOISE_GAIN = 0.02
MIN_NOISE, MAX_NOISE = 0.0009, 0.09

Parts = tuple[float, float, float]
"""Seconds of plain decoding, of what verification adds, and of draft passes."""


class PartFactors:
    """One engine's factors."""

    def __init__(self, verify_log_error: float, draft_log_error: float) -> None:
        self._machine = self._verify = self._draft = 0.0
        self._verify_prior = verify_log_error**2
        self._draft_prior = draft_log_error**2
        # Symmetric covariance: machine, verify, draft.
        self._mm, self._vv, self._dd = (
            FIRST_MACHINE_VARIANCE,
            self._verify_prior,
            self._draft_prior,
        )
        self._mv = self._md = self._vd = 0.0
        self._noise = FIRST_NOISE
        self._lasting = 0.0
        self._time_s: float | None = None
        self.verify_factor = self.draft_factor = 1.0

    @property
    def machine_factor(self) -> float:
        """How much slower than the model everything is."""
        return exp(self._machine)

    def unit_s(self, parts: Parts) -> float:
        """Seconds of a step, the machine factor left out."""
        plain_s, verify_s, drafts_s = parts
        return plain_s + verify_s * self.verify_factor + drafts_s * self.draft_factor

    def log_deviation(self, parts: Parts, other: Parts) -> float:
        """Standard deviation of how the seconds of two steps compare (logarithms)."""
        _, verify_share, draft_share = self._shares(parts)
        _, other_verify_share, other_draft_share = self._shares(other)
        verify, draft = verify_share - other_verify_share, draft_share - other_draft_share
        variance = (
            verify * verify * self._vv + draft * draft * self._dd + 2 * verify * draft * self._vd
        )
        return sqrt(max(variance, 0.0))

    def observe(self, parts: Parts, duration_s: float, known_log: float, time_s: float) -> float:
        """Learn from a step.

        Args:
            known_log: what is known besides about such steps' log seconds.

        Returns:
            The surprise that is left, bounded: log seconds.
        """
        self._drift(time_s)
        unit_s, verify, draft = self._shares(parts)
        surprise = log(duration_s / unit_s) - known_log - self._machine
        # Covariance times the direction that this step measures.
        to_machine = self._mm + verify * self._mv + draft * self._md
        to_verify = self._mv + verify * self._vv + draft * self._vd
        to_draft = self._md + verify * self._vd + draft * self._dd
        spread = to_machine + verify * to_verify + draft * to_draft + self._noise
        surprise = self._bounded(surprise, spread)
        step = surprise / spread
        self._machine += to_machine * step
        self._verify += to_verify * step
        self._draft += to_draft * step
        self._mm -= to_machine * to_machine / spread
        self._vv -= to_verify * to_verify / spread
        self._dd -= to_draft * to_draft / spread
        self._mv -= to_machine * to_verify / spread
        self._md -= to_machine * to_draft / spread
        self._vd -= to_verify * to_draft / spread
        self.verify_factor, self.draft_factor = exp(self._verify), exp(self._draft)
        left = surprise * self._noise / spread
        seen = surprise * surprise * self._noise / spread
        self._noise += NOISE_GAIN * (seen - self._noise)
        self._noise = min(max(self._noise, MIN_NOISE), MAX_NOISE)
        return left

    def loosen_machine(self, log_deviation: float) -> None:
        """The next steps differ from those before in a way the model may be wrong about."""
        self._mm += log_deviation**2

    def _shares(self, parts: Parts) -> Parts:
        """Seconds without the machine factor, and the shares of the last two parts in them."""
        plain_s, verify_s, drafts_s = parts
        verify_s *= self.verify_factor
        drafts_s *= self.draft_factor
        unit_s = plain_s + verify_s + drafts_s
        return unit_s, verify_s / unit_s, drafts_s / unit_s

    def _bounded(self, surprise: float, spread: float) -> float:
        deviation = sqrt(spread)
        limit = MAX_DEVIATIONS * deviation
        bounded = min(max(surprise, -limit), limit)
        self._lasting += LASTING_GAIN * (bounded / deviation - self._lasting)
        if abs(self._lasting) > LASTING_DEVIATIONS:
            self._lasting = 0.0
            self._mm += CHANGED_MACHINE_VARIANCE
        return bounded

    def _drift(self, time_s: float) -> None:
        self._mm += MACHINE_DRIFT
        elapsed_s = 0.0 if self._time_s is None else max(time_s - self._time_s, 0.0)
        self._time_s = time_s
        gained = PART_DRIFT_PER_S * elapsed_s
        if self._vv < self._verify_prior:
            self._vv = min(self._vv + gained, self._verify_prior)
        if self._dd < self._draft_prior:
            self._dd = min(self._dd + gained, self._draft_prior)
