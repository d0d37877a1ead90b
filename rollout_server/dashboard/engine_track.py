"""The recent past of one engine: KV occupancy with draft length, and throughput. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from shared.schemas.dashboard import KvPoint
from shared.schemas.engines import EngineStatus
from shared.schemas.speculation import SpeculationStep

MAX_POINTS = 1200
MIN_SPACING_S = 0.25
"""Between two points, unless drafting went on or off."""


class EngineTrack:
    """Points come from the engine's own decisions; while it makes none, from its status."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.last_step = 0
        """Of the decisions seen so far."""
        self._points: deque[KvPoint] = deque(maxlen=MAX_POINTS)
        self._new: list[KvPoint] = []
        self._counted: tuple[float, int] | None = None  # uptime, tokens
        self._has_decided = False

    @property
    def points(self) -> list[KvPoint]:
        """All that are kept."""
        return list(self._points)

    def add_decisions(self, steps: Sequence[SpeculationStep]) -> None:
        """Recorded decisions, oldest first."""
        for step in steps:
            self.last_step = max(self.last_step, step.step)
            self._has_decided = True
            self._add(step.time_s, step.kv_cache_usage, step.num_speculative_tokens)

    def tick(self, time_s: float, status: EngineStatus, draft_length: int) -> list[KvPoint]:
        """The points that are new since the last tick."""
        self._measure(status)
        if not self._has_decided:
            # An idle engine drafts nothing, whatever its last step did.
            length = draft_length if status.num_running_reqs else 0
            self._add(time_s, status.kv_cache_usage, length)
        self._has_decided = False
        new, self._new = self._new, []
        return new

    def _add(self, time_s: float, kv_cache_usage: float, draft_length: int) -> None:
        if self._points:
            last_s, _, last_length = self._points[-1]
            is_switch = (last_length > 0) != (draft_length > 0)
            if time_s <= last_s or (time_s - last_s < MIN_SPACING_S and not is_switch):
                return
        point = (round(time_s, 3), round(kv_cache_usage, 4), draft_length)
        self._points.append(point)
        self._new.append(point)

    def _measure(self, status: EngineStatus) -> None:
        """Over the engine's own clock: polls and ticks are not in step."""
        now = (status.uptime_s, status.num_generation_tokens)
        if self._counted is not None and now[0] > self._counted[0]:
            num_tokens = max(0, now[1] - self._counted[1])
            self.tokens_per_s = round(num_tokens / (now[0] - self._counted[0]), 2)
        if self._counted is None or now[0] != self._counted[0]:
            self._counted = now
