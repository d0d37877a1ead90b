"""The thread that writes the ledger: gathers, commits, tells, and tries again what failed."""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import monotonic

from rollout_server.rollouts.ledger_file import LedgerFile
from rollout_server.rollouts.ledger_records import Accepted, LedgerChange, size_of

LOGGER = logging.getLogger(__name__)

MAX_BATCH_CHANGES = 256
MAX_BATCH_BYTES = 16 * 1024 * 1024
"""Of one transaction: whoever comes next waits for it."""
RETRY_S = 1.0
"""Between attempts to write what could not be written."""


class WriteOutcome(StrEnum):
    """What became of a change."""

    WRITTEN = "written"
    WITHOUT_EFFECT = "without_effect"
    """It did not follow the transitions: it had been made before, or its request is not known."""
    NOT_WRITTEN = "not_written"
    """An acceptance is given up then; anything else is written as soon as it can be."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """A change, and who waits for it."""

    change: LedgerChange
    done: asyncio.Future[WriteOutcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenBatch:
    """What one round did; ``outcomes`` go with ``entries``."""

    entries: Sequence[Entry]
    outcomes: Sequence[WriteOutcome]
    problem: str | None
    """Why something could not be written."""
    num_overdue: int
    commit_s: float
    num_bytes: int


class LedgerWriter:
    """Owns the file from ``start`` to ``close``."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._overdue: list[LedgerChange] = []
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        return self._file.path

    def start(self, on_round: Callable[[WrittenBatch], None]) -> None:
        """``on_round`` is called in the thread."""
        # A daemon: a server that fails to close it still ends.
        self._thread = threading.Thread(
            target=self._run, args=(on_round,), name="rollout-ledger", daemon=True
        )
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Hand over; returns at once."""
        self._queue.put(entry)

    def close(self, timeout_s: float) -> int:
        """Write what is there and end the thread. Blocks. May be called again.

        Returns:
            Changes that could not be written.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                LOGGER.error("ledger %s: still writing after %g s", self.path, timeout_s)
            self._thread = None
        return len(self._overdue)

    def _run(self, on_round: Callable[[WrittenBatch], None]) -> None:
        is_open = True
        while is_open:
            entries, is_open = self._gather()
            if entries or self._overdue:
                on_round(self._write(entries))
        self._file.close()

    def _gather(self) -> tuple[list[Entry], bool]:
        """Everything that waits, up to a transaction's size; False when there is no more to come.

        No timeout but for what is overdue: an idle ledger waits for nothing but the next change.
        """
        entries: list[Entry] = []
        num_bytes = 0
        try:
            entry = self._queue.get(timeout=RETRY_S if self._overdue else None)
            while entry is not None:
                entries.append(entry)
                num_bytes += size_of(entry.change)
                if len(entries) >= MAX_BATCH_CHANGES or num_bytes >= MAX_BATCH_BYTES:
                    return entries, True
                entry = self._queue.get_nowait()
        except queue.Empty:
            return entries, True
        return entries, False

    def _write(self, entries: list[Entry]) -> WrittenBatch:
        started_s = monotonic()
        problem: str | None = None
        try:
            outcomes = self._commit(entries)
        except sqlite3.Error as exc:
            problem = str(exc)
            outcomes = self._without_acceptances(entries)
        except Exception as exc:  # a bug of ours must not leave requests waiting
            LOGGER.exception("ledger %s: %d changes are lost", self.path, len(entries))
            problem = f"internal error ({type(exc).__name__}); the server's log has the details"
            outcomes = [WriteOutcome.NOT_WRITTEN] * len(entries)
        return WrittenBatch(
            entries=entries,
            outcomes=outcomes,
            problem=problem,
            num_overdue=len(self._overdue),
            commit_s=monotonic() - started_s,
            num_bytes=self._file.num_bytes(),
        )

    def _commit(self, entries: Sequence[Entry]) -> list[WriteOutcome]:
        """What is overdue first: changes keep their order.

        Raises:
            sqlite3.Error: nothing was written.
        """
        num_overdue = len(self._overdue)
        changes = [*self._overdue, *(entry.change for entry in entries)]
        effects = self._file.apply(changes)[num_overdue:]
        self._overdue.clear()
        return [
            WriteOutcome.WRITTEN if had_effect else WriteOutcome.WITHOUT_EFFECT
            for had_effect in effects
        ]

    def _without_acceptances(self, entries: Sequence[Entry]) -> list[WriteOutcome]:
        """Give up the requests that were to be accepted: perhaps the rest finds room without."""
        others = [entry for entry in entries if not isinstance(entry.change, Accepted)]
        outcomes = [WriteOutcome.NOT_WRITTEN] * len(others)
        try:
            if len(others) < len(entries):
                outcomes = self._commit(others)
        except sqlite3.Error:
            pass  # told already, and still so
        if WriteOutcome.NOT_WRITTEN in outcomes:
            self._overdue += [entry.change for entry in others]
        by_entry = dict(zip(map(id, others), outcomes, strict=True))
        return [by_entry.get(id(entry), WriteOutcome.NOT_WRITTEN) for entry in entries]
