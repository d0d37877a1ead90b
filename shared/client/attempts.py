"""Whether a call that failed is tried again, and when. Pure: time comes in as a function."""

from __future__ import annotations

from collections.abc import Callable

from shared.errors import UnavailableError

FIRST_RETRY_DELAY_S = 0.25
MAX_RETRY_DELAY_S = 8.0


class Attempts:
    """Counts the failures since the last progress.

    Args:
        timeout_s: longest time without progress.
        timeout_setting: what messages call it.
    """

    def __init__(
        self, what: str, *, timeout_s: float, timeout_setting: str, clock: Callable[[], float]
    ) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._timeout_setting = timeout_setting
        self._clock = clock
        self.progressed()

    def progressed(self) -> None:
        """Patience starts afresh."""
        self._since_s = self._clock()
        self._num_failures = 0

    def delay_after(self, error: UnavailableError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            UnavailableError: the time would be up by then.
        """
        self._num_failures += 1
        # Capped: a long outage must not make the first success late.
        backoff_s = min(
            FIRST_RETRY_DELAY_S * 2.0 ** min(self._num_failures - 1, 10), MAX_RETRY_DELAY_S
        )
        delay_s = max(backoff_s, error.retry_after_s or 0.0)
        waited_s = self._clock() - self._since_s
        if waited_s + delay_s > self._timeout_s:
            raise UnavailableError(
                f"{self._what}: no progress for {waited_s:.0f} s in {self._num_failures} attempts "
                f"({self._timeout_setting} {self._timeout_s:g}): {error.message}"
            ) from error
        return delay_s

    def check_patience(self, state: str) -> None:
        """Between polls that are answered.

        Raises:
            UnavailableError: nothing has changed for too long; names ``state``.
        """
        waited_s = self._clock() - self._since_s
        if waited_s > self._timeout_s:
            raise UnavailableError(
                f"{self._what}: no progress for {waited_s:.0f} s "
                f"({self._timeout_setting} {self._timeout_s:g}): {state}"
            )
