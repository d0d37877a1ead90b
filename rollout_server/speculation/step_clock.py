"""Times an engine's steps from what its scheduler sees of them. Pure; time is passed in."""

from __future__ import annotations

from collections import deque

from rollout_server.speculation.steps import StepShape

MAX_GAP_S = 0.02
"""Between the end of a step and the start of the next: up to this it is the engine's own
bookkeeping and counts as the next step's; beyond it the engine was idle or paused."""


class StepClock:
    """Pairs begun steps with finished ones, in order; several may be under way at once."""

    def __init__(self) -> None:
        self._begun: deque[tuple[StepShape | None, float]] = deque()
        self._last_end_s = float("-inf")

    def begin(self, shape: StepShape | None, time_s: float) -> None:
        """A step was scheduled; None if it computes nothing."""
        self._begun.append((shape, time_s))

    def finish(self, time_s: float) -> tuple[StepShape, float] | None:
        """The oldest step under way is over: its shape and seconds. None if it computed nothing.

        A step that began while the one before it ran took only what came after that one's end.
        """
        if not self._begun:
            return None
        shape, begun_s = self._begun.popleft()
        last_end_s, self._last_end_s = self._last_end_s, time_s
        if shape is None:
            return None
        start_s = last_end_s if begun_s - last_end_s < MAX_GAP_S else begun_s
        return shape, time_s - start_s
