"""How likely the target accepts the drafts at each position. Pure; time is passed in.

A position's figure is conditional: given that every draft before it was accepted. Two windows
count: a long one for precision, a short one that notices when the drafter has changed under it (a
push, another kind of prompt); when they disagree beyond chance, the long one starts again from the
short one. What was never tried is taken to go on as the position before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

LONG_WINDOW = 500.0
"""Drafts after which the long window's evidence has decayed by a factor of e."""
SHORT_WINDOW = 40.0
PRIOR_ACCEPTANCE = 0.8
"""Taken for a drafter nobody has tried: round-to-nearest copies are accepted at 0.8 to 0.98."""
PRIOR_DRAFTS = 6.0
"""Drafts that the prior, or the position before, counts for."""
ALARM_DEVIATIONS = 4.0
"""Standard deviations between the windows that count as a change."""
PUSH_DISCOUNT = 0.1
"""Share of the evidence that outlives a weight push."""
HALF_LIFE_S = 30.0
"""Evidence loses half its weight in this time."""


@dataclass(slots=True)
class _Window:
    size: float
    tried: list[float]
    accepted: list[float]

    @classmethod
    def of(cls, size: float, num_positions: int) -> _Window:
        return cls(size, [0.0] * num_positions, [0.0] * num_positions)

    def add(self, tried: Sequence[int], accepted: Sequence[int]) -> None:
        for position, count in enumerate(tried):
            if count:
                keep = max(1 - count / self.size, 0.0)
                self.tried[position] = self.tried[position] * keep + count
                self.accepted[position] = self.accepted[position] * keep + accepted[position]

    def scale(self, factor: float) -> None:
        self.tried = [count * factor for count in self.tried]
        self.accepted = [count * factor for count in self.accepted]


class AcceptanceTracker:
    """One engine's acceptance, for positions 1 to ``num_positions``."""

    def __init__(self, num_positions: int) -> None:
        self._long = _Window.of(LONG_WINDOW, num_positions)
        self._short = _Window.of(SHORT_WINDOW, num_positions)
        self._time_s: float | None = None
        self._cache: tuple[float, ...] | None = None
        self.num_changes_noticed = 0

    def observe(
        self, num_tried_per_pos: Sequence[int], num_accepted_per_pos: Sequence[int], time_s: float
    ) -> None:
        """Count one step's verified drafts: [num_positions] each, over all requests.

        Args:
            num_tried_per_pos: drafts whose predecessors were all accepted; the others say nothing
                about their position.
        """
        if not num_tried_per_pos or not num_tried_per_pos[0]:
            return
        self._age(time_s)
        self._long.add(num_tried_per_pos, num_accepted_per_pos)
        self._short.add(num_tried_per_pos, num_accepted_per_pos)
        if self._windows_disagree():
            self._long.tried = list(self._short.tried)
            self._long.accepted = list(self._short.accepted)
            self.num_changes_noticed += 1
        self._cache = None

    def weights_changed(self) -> None:
        """Another policy, another drafter: keep the figures as a first guess only."""
        self._long.scale(PUSH_DISCOUNT)
        self._short.scale(PUSH_DISCOUNT)
        self._cache = None

    def per_position(self) -> tuple[float, ...]:
        """Conditional acceptance, [num_positions]."""
        if self._cache is None:
            figures: list[float] = []
            before = PRIOR_ACCEPTANCE
            for tried, accepted in zip(self._long.tried, self._long.accepted, strict=True):
                before = (accepted + before * PRIOR_DRAFTS) / (tried + PRIOR_DRAFTS)
                figures.append(before)
            self._cache = tuple(figures)
        return self._cache

    def optimistic_per_position(self, time_s: float) -> tuple[float, ...]:
        """What it may be as far as the evidence, aged to now, goes: one deviation up."""
        fade = self._fade(time_s)
        return tuple(
            min(1.0, figure + sqrt((figure * (1 - figure) + 0.05) / (tried * fade + 1)))
            for figure, tried in zip(self.per_position(), self._long.tried, strict=True)
        )

    def _windows_disagree(self) -> bool:
        short_tried = sum(self._short.tried)
        long_tried = sum(self._long.tried)
        if short_tried < SHORT_WINDOW / 2 or long_tried < 2 * short_tried:
            return False
        short = sum(self._short.accepted) / short_tried
        long = sum(self._long.accepted) / long_tried
        deviation = sqrt(max(long * (1 - long), 0.01) / short_tried)
        return abs(short - long) > ALARM_DEVIATIONS * deviation

    def _age(self, time_s: float) -> None:
        """Evidence fades with time too: a draft length of an hour ago is a guess."""
        fade = self._fade(time_s)
        if fade < 0.99:
            self._long.scale(fade)
            self._short.scale(fade)
            self._time_s = time_s
        elif self._time_s is None:
            self._time_s = time_s

    def _fade(self, time_s: float) -> float:
        if self._time_s is None:
            return 1.0
        return float(0.5 ** (max(time_s - self._time_s, 0.0) / HALF_LIFE_S))


def mean_acceptance_lengths(acceptance_per_pos: Sequence[float]) -> list[float]:
    """Tokens a cycle yields at draft length 0, 1, ...: [num_positions + 1], the bonus included."""
    lengths = [1.0]
    survival = 1.0
    for acceptance in acceptance_per_pos:
        survival *= acceptance
        lengths.append(lengths[-1] + survival)
    return lengths


class RequestAcceptance:
    """One request's own acceptance, pulled to the engine's while it rests on few drafts."""

    __slots__ = ("_accepted", "_tried")

    WINDOW = 60.0
    """Drafts after which evidence has decayed by a factor of e."""

    def __init__(self) -> None:
        self._tried = 0.0
        self._accepted = 0.0

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Count one verified draft."""
        tried = min(num_accepted_tokens + 1, num_draft_tokens)
        keep = max(1 - tried / self.WINDOW, 0.0)
        self._tried = self._tried * keep + tried
        self._accepted = self._accepted * keep + num_accepted_tokens

    def worthwhile_length(
        self, engine_acceptance_per_pos: Sequence[float], min_survival: float, limit: int
    ) -> int:
        """Drafts whose chance of being accepted is at least ``min_survival``; one at least."""
        survival = 1.0
        for position in range(min(limit, len(engine_acceptance_per_pos))):
            prior = engine_acceptance_per_pos[position] * PRIOR_DRAFTS
            survival *= (self._accepted + prior) / (self._tried + PRIOR_DRAFTS)
            if survival < min_survival and position > 0:
                return position
        return limit
