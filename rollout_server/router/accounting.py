"""Every accepted sample ends exactly once: delivered, failed or cancelled."""

from __future__ import annotations

from typing import Protocol

from shared.errors import OverloadedError, UnavailableError


class SampleTotals(Protocol):
    """How many samples there were, and how they ended."""

    @property
    def num_accepted(self) -> int: ...

    @property
    def num_delivered(self) -> int: ...

    @property
    def num_failed(self) -> int: ...

    @property
    def num_cancelled(self) -> int: ...


class SampleAccounts:
    """Counters of samples, and the bound on pending ones.

    ``num_accepted == num_delivered + num_failed + num_cancelled + num_pending`` at all times. Over
    the server's life; those of rollouts over its restarts too, where there is a ledger.
    """

    def __init__(self, max_pending_samples: int) -> None:
        self.max_pending_samples = max_pending_samples
        self.num_accepted = 0
        self.num_delivered = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_pending = 0
        self.refusal: str | None = None
        """Why nothing new is accepted, once that is so."""
        self._num_reserved = 0

    @property
    def num_unaccounted(self) -> int:
        """Samples of which nobody knows what became: always 0."""
        ended = self.num_delivered + self.num_failed + self.num_cancelled
        return self.num_accepted - ended - self.num_pending

    def restore(self, totals: SampleTotals, num_pending: int) -> None:
        """Go on from an earlier process. Its pending samples are taken even above the bound."""
        self.num_accepted += totals.num_accepted
        self.num_delivered += totals.num_delivered
        self.num_failed += totals.num_failed
        self.num_cancelled += totals.num_cancelled
        self.num_pending += num_pending

    def accept(self, num_samples: int) -> None:
        """Take ``num_samples`` on, all or none.

        Raises:
            UnavailableError: nothing new is accepted any more.
            OverloadedError: they would exceed ``server.limits.max_pending_samples``.
        """
        self.check_room(num_samples)
        self._num_reserved += num_samples
        self.admit(num_samples)

    def reserve(self, num_samples: int) -> None:
        """Hold room for samples that are about to be taken on; ``admit`` or ``release`` follows.

        Raises:
            as ``accept``.
        """
        self.check_room(num_samples)
        self._num_reserved += num_samples

    def check_room(self, num_samples: int) -> None:
        """Whether ``accept`` would take them now.

        Raises:
            as ``accept``.
        """
        if self.refusal is not None:
            raise UnavailableError(self.refusal)
        num_held = self.num_pending + self._num_reserved
        if num_held + num_samples > self.max_pending_samples:
            raise OverloadedError(
                f"{num_samples} samples on top of {num_held} pending ones exceed "
                f"server.limits.max_pending_samples {self.max_pending_samples}"
            )

    def admit(self, num_samples: int) -> None:
        """Take on what was reserved."""
        self.release(num_samples)
        self.num_accepted += num_samples
        self.num_pending += num_samples

    def refuse(self, reason: str) -> None:
        """Accept nothing from now on."""
        self.refusal = reason

    def release(self, num_samples: int) -> None:
        """Give reserved room back: they were not taken on."""
        assert num_samples <= self._num_reserved, "released more room than was reserved"
        self._num_reserved -= num_samples

    def settle(
        self, *, num_delivered: int = 0, num_failed: int = 0, num_cancelled: int = 0
    ) -> None:
        """Record how pending samples ended."""
        num_settled = num_delivered + num_failed + num_cancelled
        assert num_settled <= self.num_pending, "a sample was settled twice"
        self.num_delivered += num_delivered
        self.num_failed += num_failed
        self.num_cancelled += num_cancelled
        self.num_pending -= num_settled

    def check(self) -> None:
        """Assert the invariant; cheap enough to call anywhere."""
        assert self.num_pending >= 0, f"negative number of pending samples: {self.num_pending}"
        assert self.num_unaccounted == 0, (
            f"accepted {self.num_accepted} != delivered {self.num_delivered} + failed "
            f"{self.num_failed} + cancelled {self.num_cancelled} + pending {self.num_pending}"
        )
