"""The ledger as the event loop sees it: changes go in, and a thread of its own writes them.

Whatever has gathered while one transaction is written goes into the next, so that many small
changes cost few commits, and a single one does not wait. The loop only hands over and is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rollout_server.rollouts.ledger_opening import open_ledger_file
from rollout_server.rollouts.ledger_records import Accepted, Books, LedgerChange, LedgerContents
from rollout_server.rollouts.ledger_writer import (
    Entry,
    LedgerWriter,
    WriteOutcome,
    WrittenBatch,
)
from shared.errors import SlipstreamError, UnavailableError

LOGGER = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
EMPTY = LedgerContents(books=Books(), unfinished=(), ended=())


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerStats:
    """For metrics; all 0 without a ledger."""

    num_bytes: int = 0
    """On disk."""
    num_unwritten: int = 0
    """Changes handed over and not on disk yet."""
    num_commits: int = 0
    commit_s: float = 0.0
    """Seconds of all commits."""
    num_write_failures: int = 0


class Ledger(Protocol):
    """Remembers accepted requests and finished groups over the end of the process, or does not."""

    @property
    def is_kept(self) -> bool:
        """False: changes go nowhere, and nothing survives a restart."""
        ...

    @property
    def stats(self) -> LedgerStats: ...

    async def accept(self, change: Accepted) -> None:
        """Return once it is on disk.

        Raises:
            UnavailableError: it cannot be written; it is as if the request had never come.
        """
        ...

    def write(self, change: LedgerChange) -> asyncio.Future[WriteOutcome]:
        """Done once it is on disk, or writing it has failed. Never raises."""
        ...

    def take_contents(self) -> LedgerContents:
        """What an earlier process has left. Once: its groups are the caller's to hold."""
        ...

    async def close(self) -> None:
        """Write what is left, and stop. May be called again."""
        ...


class NoLedger:
    """``server.ledger: off``."""

    is_kept = False
    stats = LedgerStats()

    async def accept(self, change: Accepted) -> None:
        return None

    def write(self, change: LedgerChange) -> asyncio.Future[WriteOutcome]:
        return _at_once(WriteOutcome.WRITTEN)

    def take_contents(self) -> LedgerContents:
        return EMPTY

    async def close(self) -> None:
        return None


class RolloutLedger:
    """A file, and the thread that writes it. For one event loop."""

    is_kept = True

    def __init__(self, writer: LedgerWriter, contents: LedgerContents, num_bytes: int) -> None:
        self._writer = writer
        self._contents = contents
        self._num_bytes = num_bytes
        self._num_waiting = 0
        self._num_overdue = 0
        self._num_commits = 0
        self._commit_s = 0.0
        self._num_write_failures = 0
        self._problem: str | None = None
        self._is_closed = False
        loop = asyncio.get_running_loop()

        def tell_loop(batch: WrittenBatch) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who waited
                loop.call_soon_threadsafe(self._written, batch)

        writer.start(tell_loop)

    @classmethod
    async def open(cls, path: Path) -> RolloutLedger:
        """Open or make the file and start its thread.

        Raises:
            ConfigurationError: the file cannot be used, and why.
        """
        file = await asyncio.to_thread(open_ledger_file, path)
        contents = await asyncio.to_thread(file.read)
        return cls(LedgerWriter(file), contents, file.num_bytes())

    @property
    def stats(self) -> LedgerStats:
        return LedgerStats(
            num_bytes=self._num_bytes,
            num_unwritten=self._num_waiting + self._num_overdue,
            num_commits=self._num_commits,
            commit_s=self._commit_s,
            num_write_failures=self._num_write_failures,
        )

    async def accept(self, change: Accepted) -> None:
        outcome = await self.write(change)
        if outcome is WriteOutcome.NOT_WRITTEN:
            raise UnavailableError(
                f"the request cannot be recorded in {self._writer.path}: "
                f"{self._problem or 'it is closed'}. Retry, or set server.ledger "
                "off to take requests without recording them"
            )
        if outcome is WriteOutcome.WITHOUT_EFFECT:
            raise SlipstreamError(
                f"{self._writer.path} has {change.request_id!r} in a state that the server does "
                "not; use a new request_id"
            )

    def write(self, change: LedgerChange) -> asyncio.Future[WriteOutcome]:
        if self._is_closed:
            return _at_once(WriteOutcome.NOT_WRITTEN)
        done: asyncio.Future[WriteOutcome] = asyncio.get_running_loop().create_future()
        self._num_waiting += 1
        self._writer.put(Entry(change=change, done=done))
        return done

    def take_contents(self) -> LedgerContents:
        contents, self._contents = self._contents, EMPTY
        return contents

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        num_lost = await asyncio.to_thread(self._writer.close, CLOSE_TIMEOUT_S)
        if num_lost:
            LOGGER.error(
                "ledger %s: %d changes could not be written: after a restart their groups are "
                "generated again",
                self._writer.path,
                num_lost,
            )

    def _written(self, batch: WrittenBatch) -> None:
        self._num_waiting -= len(batch.entries)
        self._num_overdue = batch.num_overdue
        self._num_commits += 1
        self._commit_s += batch.commit_s
        self._num_bytes = batch.num_bytes
        self._num_write_failures += batch.problem is not None
        if (batch.problem is None) != (self._problem is None):
            self._tell(batch)
        self._problem = batch.problem
        for entry, outcome in zip(batch.entries, batch.outcomes, strict=True):
            if not entry.done.done():  # whoever waited may have been cancelled
                entry.done.set_result(outcome)

    def _tell(self, batch: WrittenBatch) -> None:
        if batch.problem is None:
            LOGGER.warning("ledger %s can be written again", self._writer.path)
            return
        LOGGER.error(
            "ledger %s cannot be written: %s. New rollout requests answer 503; finished groups are "
            "delivered, and recorded as soon as it works again",
            self._writer.path,
            batch.problem,
        )


def _at_once(outcome: WriteOutcome) -> asyncio.Future[WriteOutcome]:
    done: asyncio.Future[WriteOutcome] = asyncio.get_running_loop().create_future()
    done.set_result(outcome)
    return done
