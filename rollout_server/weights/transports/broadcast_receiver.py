"""A receiver that takes part in a trainer's broadcast (``weights.transport: nccl``).

A plain class; ``collective_transport`` makes it an actor on the server's node and on each other
node that has engines. It needs threads: ``receive`` waits for the trainer, others must be answered.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from rollout_server.weights.transports.receiver import SegmentReceiver
from shared.clock import Clock
from shared.collective import Seat

Receive = Callable[[int, npt.NDArray[np.uint8]], int]
"""Fills the beginning of a buffer with what comes after a position; how much that was."""


class BroadcastReceiver(SegmentReceiver):
    """Segments come to files as under the transport ``ray``, but all receivers get one at once."""

    def __init__(
        self,
        directory: str,
        *,
        idle_limit_s: float,
        kept_limit_s: float,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(
            directory, idle_limit_s=idle_limit_s, kept_limit_s=kept_limit_s, clock=clock
        )
        self._deliveries: dict[str, str] = {}
        """Upload by the segment's name on the server's node."""

    def gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs it could receive with."""
        from shared.collective_group import usable_gpus  # torch takes seconds: not at the start

        return usable_gpus()

    def receive(self, upload_id: str, seat: Seat) -> None:
        """Take part in one broadcast, from the meeting to the complete file. Blocks.

        Raises:
            WeightTransferError: a member is gone or late, this upload was superseded, or the bytes
                cannot be written. Nothing is left of it.
        """
        from shared.collective_group import BroadcastGroup

        try:
            group = BroadcastGroup(seat)
            try:
                self._take_buckets(upload_id, seat, group.receive)
            finally:
                group.close()
            self.finish(upload_id)
        except BaseException:  # whatever it is, nobody asks for half a segment
            self.discard(upload_id)
            raise
        with self._lock:
            self._deliveries = {
                segment: known
                for segment, known in self._deliveries.items()
                if known in self._uploads
            } | {seat.invitation.segment: upload_id}

    def delivered(self, segment: str) -> str | None:
        """Path of what has come here under this name, complete; None if nothing has."""
        with self._lock:
            upload = self._uploads.get(self._deliveries.get(segment, ""))
            if upload is None or not upload.is_complete:
                return None
            return str(upload.file.path)

    def _take_buckets(self, upload_id: str, seat: Seat, receive: Receive) -> None:
        """One half of a bucket comes while the other is written."""
        plan = seat.invitation
        size = min(plan.piece_bytes, plan.num_bytes)
        coming, other = np.empty(size, np.uint8), np.empty(size, np.uint8)
        position = 0
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, "broadcast-writer") as writer:
            while position < plan.num_bytes:
                length = receive(position, coming)
                if writing is not None:
                    writing.result()
                writing = writer.submit(self.append, upload_id, position, coming[:length])
                coming, other = other, coming
                position += length
            if writing is not None:
                writing.result()
