"""When a pool may start engines in place of those it lost. A state machine; time is passed in.

Example, with a backoff of 1 s up to 60 s and a budget of 5 in 600 s::

    an engine dies after it served        -> its replacement starts 1 s later
    three starts in a row fail            -> 1, 2, 4 s between them
    one serves                            -> the next failure waits 1 s again
    a node dies with four engines         -> all four are replaced 1 s later
    the 6th loss within 600 s             -> quarantined, until an operator asks for a count
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shared.config.engine import EngineConfig
from shared.pool_types import RESTART_TRANSITIONS, RestartState


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartLimits:
    """Settings ``engine.restart_*``."""

    backoff_s: float
    max_backoff_s: float
    budget: int
    """Losses per engine asked for, within the window."""
    window_s: float

    @classmethod
    def of(cls, engine: EngineConfig) -> RestartLimits:
        """From the configuration."""
        return cls(
            backoff_s=engine.restart_backoff_s,
            max_backoff_s=engine.restart_max_backoff_s,
            budget=engine.restart_budget,
            window_s=engine.restart_window_s,
        )


class Restarts:
    """Of one pool. Ask ``state`` before engines are started; report every loss and every start."""

    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self._state = RestartState.READY
        self._losses_s: deque[float] = deque()
        self._num_in_row = 0
        self._ready_at_s = 0.0
        self._last_reason: str | None = None

    @property
    def num_in_row(self) -> int:
        """Attempts that failed since an engine last began to serve."""
        return self._num_in_row

    @property
    def last_reason(self) -> str | None:
        """Of the last loss; None when there was none since ``clear``."""
        return self._last_reason

    def state(self, now_s: float) -> RestartState:
        """As of now."""
        if self._state is RestartState.BACKING_OFF and now_s >= self._ready_at_s:
            self._move(RestartState.READY)
        return self._state

    def wait_s(self, now_s: float) -> float:
        """Until engines may start again; 0 when they may, or when only an operator can say so."""
        if self.state(now_s) is not RestartState.BACKING_OFF:
            return 0.0
        return self._ready_at_s - now_s

    def num_in_window(self, now_s: float) -> int:
        """Losses that count against the budget."""
        while self._losses_s and now_s - self._losses_s[0] >= self._limits.window_s:
            self._losses_s.popleft()
        return len(self._losses_s)

    def budget(self, target_count: int) -> int:
        """Losses that are allowed within the window."""
        return self._limits.budget * max(1, target_count)

    def lost(self, now_s: float, reason: str, target_count: int) -> None:
        """An engine that is to be replaced did not start, died or was given up."""
        self._last_reason = reason
        self._losses_s.append(now_s)
        if self.num_in_window(now_s) > self.budget(target_count):
            self._move(RestartState.QUARANTINED)
        # Nothing was tried since: losses at one time, as of a node with its engines, are one.
        if self.state(now_s) is not RestartState.READY:
            return
        self._num_in_row += 1
        # Powers beyond the cap would overflow a float some day.
        exponent = min(self._num_in_row - 1, 32)
        wait_s = min(self._limits.backoff_s * 2.0**exponent, self._limits.max_backoff_s)
        self._ready_at_s = now_s + wait_s
        self._move(RestartState.BACKING_OFF)

    def served(self) -> None:
        """An engine started and serves."""
        self._num_in_row = 0

    def clear(self) -> None:
        """An operator wants engines: begin anew."""
        self._losses_s.clear()
        self._num_in_row = 0
        self._ready_at_s = 0.0
        self._last_reason = None
        if self._state is not RestartState.READY:
            self._move(RestartState.READY)

    def _move(self, state: RestartState) -> None:
        if state is self._state:
            return
        assert state in RESTART_TRANSITIONS[self._state], f"{self._state} to {state}"
        self._state = state
