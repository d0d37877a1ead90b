"""Which groups are late, and how their last samples change engines. Pure; time is passed in.

A late sample could be run a second time on another engine, and the copy that finishes first be
delivered. **That makes completions shorter.** Let every token end a sample with probability 1/2: a
completion has length 1 with probability 1/2, the first to finish of two has it with 3/4. To take
the copy of the faster engine is no better, as long as the choice looks at which copy has ended, or
at how fast it was: speed depends on what was drafted, and so on the tokens. Equal seeds would make
the copies equal, but not where two engines batch or draft differently.

So there is one copy. Its engine is told to stop, and answers with what it has at that moment; the
rest is sampled elsewhere behind that. **Completions keep their distribution.** Write p(. | x) for
the distribution of what follows the tokens x. Whether and when to stop depends on what happened
until then (tokens, times, loads), not on tokens that nobody has seen. So, given that a sample is
stopped at x, its own engine would have gone on with p(. | x), and so does the other. For every
completion y

    P(y) = P(y, never stopped) + sum over prefixes x of y of P(stopped at x) p(rest of y | x)

therefore has the same terms as on one engine. Three things are needed, and the code keeps to them:

- What goes on and what has ended is one answer of the engine, of one moment. Going on from an older
  look at the tokens would throw away what came since, and only of samples that did not end in it:
  they alone would be drawn anew, with a second chance to end early. (For lack of an answer that is
  so when an engine dies, with at most ``server.progress_interval_s`` of tokens.) A step that is in
  flight at the stop is dropped unseen, whatever it holds.
- An end that comes before the stop counts, however late its news are.
- Samples that cannot go on from a prefix (``group_work.can_continue``) are left where they are:
  started over, they would have that second chance.

``tests/unit/test_straggler_bias.py`` sums all of it up over a small vocabulary, in fractions.

Example, with ``max_samples`` 2, ``patience`` 2 and groups that take 10 s::

    3 of 8 samples unfinished after 60 s    -> not late
    2 of 8 unfinished after 20 s            -> not late
    2 of 8 unfinished after 21 s            -> late: moved, if an engine has half as much to do
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from shared.config.routing import StragglersConfig

MIN_GROUPS = 8
"""Before so many have finished nobody knows what is typical."""
MAX_GROUPS = 128
"""Remembered: a push or another task changes what is typical."""


class Handover(StrEnum):
    """Whether a late group leaves an engine that lives. Once at the most."""

    NOT_YET = "not_yet"
    STOPPING = "stopping"
    """The engine was told to stop: what comes back aborted goes on elsewhere."""
    DONE = "done"


HANDOVER_TRANSITIONS: dict[Handover, frozenset[Handover]] = {
    Handover.NOT_YET: frozenset({Handover.STOPPING}),
    # Also when the engine dies before it has stopped.
    Handover.STOPPING: frozenset({Handover.DONE}),
    Handover.DONE: frozenset(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StragglerLimits:
    """Settings ``server.stragglers``."""

    max_samples: int
    patience: float

    @classmethod
    def of(cls, config: StragglersConfig) -> StragglerLimits | None:
        """From the configuration; None where it is off."""
        if not config.enabled:
            return None
        return cls(max_samples=config.max_samples, patience=config.patience)


class TypicalTime:
    """How long groups take of late, from their first engine to their end."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=MAX_GROUPS)

    def note(self, seconds: float) -> None:
        """One group has finished."""
        self._seconds.append(seconds)

    @property
    def typical_s(self) -> float | None:
        """The median; None while too little is known."""
        return median(self._seconds) if len(self._seconds) >= MIN_GROUPS else None


def is_late(
    num_unfinished: int, running_s: float, typical_s: float | None, limits: StragglerLimits
) -> bool:
    """Whether a group's unfinished samples should go to an engine with less to do."""
    if typical_s is None or num_unfinished > limits.max_samples:
        return False
    return running_s > limits.patience * typical_s
