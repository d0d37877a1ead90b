"""Waits for the result of a request that runs, as long as it gets on. Pure."""

from __future__ import annotations

from shared.client.attempts import Attempts
from shared.errors import SlipstreamError, UnavailableError
from shared.schemas.rollouts import RolloutResponse, RolloutStatusResponse
from shared.types import RolloutRunState

FETCH_INTERVAL_S = 0.5


class FetchWait:
    """Judges one status after the other."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts
        self._num_finished_groups = -1

    def check(self, status: RolloutStatusResponse) -> RolloutResponse | None:
        """The result, or None: ask again in ``FETCH_INTERVAL_S``.

        Raises:
            SlipstreamError: the request failed.
            UnavailableError: no group has finished for too long.
        """
        if status.result is not None:
            return status.result
        if status.state is RolloutRunState.FAILED:
            reason = "no reason given" if status.error is None else status.error.message
            raise SlipstreamError(f"rollouts {status.request_id} failed: {reason}")
        if status.num_finished_groups > self._num_finished_groups:
            self._num_finished_groups = status.num_finished_groups
            self._attempts.progressed()
        self._attempts.check_patience(
            f"{status.num_finished_groups} of {status.num_groups} groups are finished"
        )
        return None


def stopped(what: str) -> UnavailableError:
    """For a wait that the client's ``pause`` ended."""
    return UnavailableError(f"{what}: the waiting was ended from outside")
