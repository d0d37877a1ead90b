"""Ended executions, kept for a while so that a client that lost its connection loses nothing."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from rollout_server.rollouts.execution import RolloutExecution

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    execution: RolloutExecution
    num_bytes: int
    expires_at_s: float


class ResultStore:
    """Bounded by age and bytes; the oldest go first."""

    def __init__(
        self,
        *,
        ttl_s: float,
        max_bytes: int,
        clock: Callable[[], float] = monotonic,
        on_forget: Callable[[str], object] = lambda request_id: None,
    ) -> None:
        """
        Args:
            on_forget: told the id of every result that is not kept (any longer).
        """
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._on_forget = on_forget
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # oldest first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, execution: RolloutExecution) -> None:
        """Keep an ended execution, in place of an earlier one with the same id."""
        self.remove(execution.request_id)
        # Every entry costs something, or countless empty failures would never be evicted.
        num_bytes = execution.num_bytes + ENTRY_OVERHEAD_BYTES
        if num_bytes > self._max_bytes:
            LOGGER.warning(
                "result of %s (%d bytes) is not kept: above server.result_store_mib (%d bytes)",
                execution.request_id,
                num_bytes,
                self._max_bytes,
            )
            self._on_forget(execution.request_id)
            return
        self._entries[execution.request_id] = _Entry(
            execution=execution,
            num_bytes=num_bytes,
            expires_at_s=self._clock() + self._ttl_s,
        )
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._entries)))

    def get(self, request_id: str) -> RolloutExecution | None:
        """The ended execution, unless it is gone or too old."""
        self.sweep()
        entry = self._entries.get(request_id)
        return None if entry is None else entry.execution

    def remove(self, request_id: str) -> None:
        """Take one out that somebody else goes on with, if it is there."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes

    def sweep(self) -> None:
        """Forget what is too old."""
        now_s = self._clock()
        while self._entries:
            request_id, entry = next(iter(self._entries.items()))
            if entry.expires_at_s > now_s:
                return
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self.remove(request_id)
        self._on_forget(request_id)


ENTRY_OVERHEAD_BYTES = 4096
"""Rough cost of an entry besides its groups: the request and its prompts."""
