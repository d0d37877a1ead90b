"""Notices that acceptance has changed, and since when: Page's CUSUM test. Pure.

The sum of log-likelihood ratios of *changed* over *as before* is kept at zero while nothing has
changed, and climbs from the moment something has; above a limit it is an alarm, and the drafts
counted since it left zero are those of the new acceptance. A fall from 0.95 to 0.3 takes about ten
drafts to be noticed, and chance alone reaches the limit once in more than eight thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

CHANGE_LOGIT = 1.5
"""The change looked for, in log odds: from 0.95 down to 0.81, or from 0.3 up to 0.66."""
ALARM_LEVEL = 9.0
MAX_DRAFTS_PER_STEP = 40.0
"""Drafts that a step counts for at most: those of one step are not independent of each other."""
LEAST, MOST = 0.03, 0.97
"""Bounds on what was: one draft against a certainty must not be an alarm."""


class ChangeTest:
    """One direction of change."""

    def __init__(self, num_positions: int, direction: int) -> None:
        """
        Args:
            direction: 1 for a rise, -1 for a fall.
        """
        self._shift = CHANGE_LOGIT * direction
        self._num_positions = num_positions
        self.reset()

    def reset(self) -> None:
        """Nothing has changed."""
        self._score = 0.0
        self.tried = [0.0] * self._num_positions
        """Drafts per position since the score was last zero."""
        self.accepted = [0.0] * self._num_positions

    def observe(
        self, tried: Sequence[int], accepted: Sequence[int], acceptance_per_pos: Sequence[float]
    ) -> bool:
        """Count a step's drafts; whether they raise the alarm."""
        step_score = 0.0
        num_tried = 0
        for position, count in enumerate(tried):
            if not count:
                break
            hits = accepted[position]
            if_accepted, if_rejected = _log_ratios(acceptance_per_pos[position], self._shift)
            step_score += hits * if_accepted + (count - hits) * if_rejected
            num_tried += count
            self.tried[position] += count
            self.accepted[position] += hits
        self._score += step_score * min(1.0, MAX_DRAFTS_PER_STEP / num_tried)
        if self._score <= 0.0:
            self.reset()
        return self._score > ALARM_LEVEL


def _log_ratios(acceptance: float, shift: float) -> tuple[float, float]:
    """Log-likelihood ratios of an accepted and of a rejected draft."""
    before = min(max(acceptance, LEAST), MOST)
    odds = before / (1 - before) * exp(shift)
    after = odds / (1 + odds)
    return log(after / before), log((1 - after) / (1 - before))
