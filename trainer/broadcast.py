"""The sender's end of a broadcast: collects bytes and sends them half a bucket at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared.collective import Invitation
from shared.collective_group import BroadcastGroup
from shared.errors import WeightTransferError


class BroadcastBuckets:
    """One half of a bucket is on its way while the other fills.

    Args:
        check: raises if a receiver has given up meanwhile.
    """

    def __init__(
        self, group: BroadcastGroup, invitation: Invitation, check: Callable[[], None]
    ) -> None:
        size = min(invitation.piece_bytes, invitation.num_bytes)
        self._group = group
        self._plan = invitation
        self._check = check
        self._filling, self._other = np.empty(size, np.uint8), np.empty(size, np.uint8)
        self._num_filled = 0
        self._num_sent = 0
        self._on_its_way: Callable[[], None] | None = None

    def write(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            WeightTransferError: a member is gone or late, or there are more bytes than announced.
        """
        while data:
            room = len(self._filling) - self._num_filled
            part, data = data[:room], data[room:]
            end = self._num_filled + len(part)
            self._filling[self._num_filled : end] = np.frombuffer(part, np.uint8)
            self._num_filled = end
            if end == len(self._filling):
                self._send()

    def flush(self) -> None:
        """Send the rest, and wait until all of it is sent."""
        if self._num_filled:
            self._send()
        self._wait()
        if self._num_sent != self._plan.num_bytes:
            raise WeightTransferError(
                f"version {self._plan.version} has {self._num_sent} bytes, announced were "
                f"{self._plan.num_bytes}"
            )

    def _send(self) -> None:
        self._wait()
        self._check()
        end = self._num_sent + self._num_filled
        if end > self._plan.num_bytes:
            raise WeightTransferError(
                f"version {self._plan.version} goes on to byte {end}, announced were "
                f"{self._plan.num_bytes}"
            )
        bucket = self._filling[: self._num_filled]
        self._on_its_way = self._group.send(self._num_sent, bucket)
        self._filling, self._other = self._other, self._filling
        self._num_sent, self._num_filled = end, 0

    def _wait(self) -> None:
        waiting, self._on_its_way = self._on_its_way, None
        if waiting is not None:
            waiting()
