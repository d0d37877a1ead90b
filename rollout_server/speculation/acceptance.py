"""How likely the target accepts the drafts at each position. Pure; time is passed in.

A position's figure is conditional: given that every draft before it was accepted. It is a moving
average, precise as long as nothing changes; a test beside it notices when the drafter has changed
under it (a push, another kind of prompt) and hands over the evidence since (``acceptance_change``).
What was never tried is taken to go on as the position before it. After a push the figures of before
are only what is expected: the evidence begins at nothing, and with it the hope to be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

from rollout_server.speculation.acceptance_change import ChangeTest

WINDOW_DRAFTS = 500.0
"""Drafts after which evidence has decayed by a factor of e."""
PRIOR_ACCEPTANCE = 0.8
"""Taken for a drafter nobody has tried: round-to-nearest copies are accepted at 0.8 to 0.98."""
PRIOR_DRAFTS = 6.0
"""Drafts that the prior, or the position before, counts for."""
DRAFTS_OF_NOBODY = 2.0
"""Drafts that ``PRIOR_ACCEPTANCE`` counts for once a change was noticed."""
HALF_LIFE_S = 30.0
"""Evidence loses half its weight in this time."""


class AcceptanceTracker:
    """One engine's acceptance, for positions 1 to ``num_positions``."""

    def __init__(self, num_positions: int) -> None:
        self._tried = [0.0] * num_positions
        self._accepted = [0.0] * num_positions
        self._tests = (ChangeTest(num_positions, -1), ChangeTest(num_positions, 1))
        self._first_expected = PRIOR_ACCEPTANCE
        self._expected_ratios = [1.0] * num_positions
        """Of a position's acceptance to that of the one before."""
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
        before = self.per_position()
        for position, count in enumerate(num_tried_per_pos):
            if count:
                keep = max(1 - count / WINDOW_DRAFTS, 0.0)
                self._tried[position] = self._tried[position] * keep + count
                hits = num_accepted_per_pos[position]
                self._accepted[position] = self._accepted[position] * keep + hits
        for test in self._tests:
            if test.observe(num_tried_per_pos, num_accepted_per_pos, before):
                self._start_again(test)
        self._cache = None

    def weights_changed(self) -> None:
        """Another policy, another drafter: keep the figures as a first guess only."""
        figures = self.per_position()
        # A drafter that was bad has most likely been rebuilt: half way back to the usual.
        self._first_expected = max(figures[0], (figures[0] + PRIOR_ACCEPTANCE) / 2)
        self._expected_ratios = [
            1.0,
            *(after / before for before, after in pairwise(figures)),
        ]
        self._tried = [0.0] * len(figures)
        self._accepted = [0.0] * len(figures)
        for test in self._tests:
            test.reset()
        self._cache = None

    def per_position(self) -> tuple[float, ...]:
        """Conditional acceptance, [num_positions]."""
        if self._cache is None:
            figures: list[float] = []
            before = self._first_expected
            for tried, accepted, ratio in zip(
                self._tried, self._accepted, self._expected_ratios, strict=True
            ):
                expected = min(before * ratio, 1.0)
                before = (accepted + expected * PRIOR_DRAFTS) / (tried + PRIOR_DRAFTS)
                figures.append(before)
            self._cache = tuple(figures)
        return self._cache

    def optimistic_per_position(self, time_s: float) -> tuple[float, ...]:
        """What it may be as far as the evidence, aged to now, goes: one deviation up."""
        fade = self._fade(time_s)
        return tuple(
            min(1.0, figure + sqrt((figure * (1 - figure) + 0.05) / (tried * fade + 1)))
            for figure, tried in zip(self.per_position(), self._tried, strict=True)
        )

    def _start_again(self, test: ChangeTest) -> None:
        """From the evidence since the change."""
        self._tried, self._accepted = test.tried, test.accepted
        self._first_expected = (sum(self._accepted) + PRIOR_ACCEPTANCE * DRAFTS_OF_NOBODY) / (
            sum(self._tried) + DRAFTS_OF_NOBODY
        )
        self._expected_ratios = [1.0] * len(self._tried)
        for each in self._tests:
            each.reset()
        self.num_changes_noticed += 1

    def _age(self, time_s: float) -> None:
        """Evidence fades with time too: a draft length of an hour ago is a guess."""
        fade = self._fade(time_s)
        if fade < 0.99:
            self._tried = [count * fade for count in self._tried]
            self._accepted = [count * fade for count in self._accepted]
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
