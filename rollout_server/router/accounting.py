"""Every accepted sample ends exactly once: delivered, failed or cancelled."""

from __future__ import annotations

from shared.errors import OverloadedError


class SampleAccounts:
    """Counters of samples over the server's life, and the bound on pending ones.

    ``num_accepted == num_delivered + num_failed + num_cancelled + num_pending`` at all times.
    """

    def __init__(self, max_pending_samples: int) -> None:
        self.max_pending_samples = max_pending_samples
        self.num_accepted = 0
        self.num_delivered = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_pending = 0

    def accept(self, num_samples: int) -> None:
        """Take ``num_samples`` on, all or none.

        Raises:
            OverloadedError: they would exceed ``server.limits.max_pending_samples``.
        """
        self.check_room(num_samples)
        self.num_accepted += num_samples
        self.num_pending += num_samples

    def check_room(self, num_samples: int) -> None:
        """Whether ``accept`` would take them now.

        Raises:
            OverloadedError: as ``accept``.
        """
        if self.num_pending + num_samples > self.max_pending_samples:
            raise OverloadedError(
                f"{num_samples} samples on top of {self.num_pending} pending ones exceed "
                f"server.limits.max_pending_samples {self.max_pending_samples}"
            )

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
        ended = self.num_delivered + self.num_failed + self.num_cancelled
        assert self.num_pending >= 0, f"negative number of pending samples: {self.num_pending}"
        assert self.num_accepted == ended + self.num_pending, (
            f"accepted {self.num_accepted} != delivered {self.num_delivered} + failed "
            f"{self.num_failed} + cancelled {self.num_cancelled} + pending {self.num_pending}"
        )
