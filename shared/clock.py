"""Time as an argument, so that whatever measures or waits can be tested without waiting."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where code that measures durations gets the time from."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes backwards. For durations."""
        ...

    def wall_s(self) -> float:
        """Seconds since the Unix epoch. For time stamps shown to people."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
