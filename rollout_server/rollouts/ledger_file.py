"""The ledger's SQLite file: changed in whole batches, read after a restart.

``ledger_opening`` opens it. Everything here blocks and is used by one thread at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rollout_server.rollouts import ledger_schema as sql
from rollout_server.rollouts.kept_groups import KeptGroup
from rollout_server.rollouts.ledger_records import (
    UNFINISHED,
    AbortAsked,
    Accepted,
    Books,
    Ended,
    Forgotten,
    GroupFinished,
    KeptRequest,
    LedgerChange,
    LedgerContents,
    LedgerState,
    RecordedError,
    settled_at_end,
)
from shared.schemas.rollouts import RolloutUsage


class LedgerFile:
    """One open file. ``sqlite3.Error`` passes through from ``apply``, and nothing was changed."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def close(self) -> None:
        """Fold the log into the file and let another server have it."""
        self._connection.close()

    def num_bytes(self) -> int:
        """On disk, the write-ahead log included."""
        total = 0
        for path in (self.path, wal_of(self.path)):
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def apply(self, changes: Sequence[LedgerChange]) -> list[bool]:
        """All changes in order, or none. False for those that do not follow the transitions."""
        with self._transaction():
            books = Books()
            had_effect = []
            for change in changes:
                counted = self._apply(change)
                had_effect.append(counted is not None)
                books += counted or Books()
            counts = (books.num_accepted, books.num_delivered, books.num_failed)
            self._connection.execute(sql.ADD_TO_BOOKS, (*counts, books.num_cancelled))
        return had_effect

    def read(self) -> LedgerContents:
        """Everything."""
        names = ("num_accepted", "num_delivered", "num_failed", "num_cancelled")
        row = self._connection.execute(sql.READ_BOOKS).fetchone()
        requests = [self._request(row) for row in self._connection.execute(sql.READ_REQUESTS)]
        return LedgerContents(
            books=Books(**dict(zip(names, row, strict=True))),
            unfinished=tuple(kept for kept in requests if kept.state in UNFINISHED),
            ended=tuple(kept for kept in requests if kept.state not in UNFINISHED),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:  # nothing of a transaction that did not end is kept
            # On some errors (a full disk) SQLite has done so by itself.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _apply(self, change: LedgerChange) -> Books | None:
        """What it adds to the books; None where it had no effect."""
        match change:
            case Accepted():
                return self._accept(change)
            case GroupFinished():
                return self._add_group(change)
            case AbortAsked():
                return self._changed(sql.ABORT, (change.request_id,))
            case Ended():
                return self._end(change)
            case Forgotten():
                return self._changed(sql.FORGET, (change.request_id,))

    def _changed(self, statement: str, values: tuple[object, ...]) -> Books | None:
        return Books() if self._connection.execute(statement, values).rowcount else None

    def _accept(self, change: Accepted) -> Books | None:
        values = (
            *(change.request_id, change.digest, change.body, change.num_groups),
            *(change.num_samples, change.at_s),
        )
        if self._changed(sql.ACCEPT, values) is None:
            return None
        return Books(num_accepted=change.num_samples)

    def _add_group(self, change: GroupFinished) -> Books | None:
        group, usage = change.group, change.group.usage
        values = (
            *(group.prompt_index, usage.num_prompt_tokens, usage.num_completion_tokens),
            *(usage.num_draft_tokens, usage.num_accepted_tokens, group.body, change.request_id),
        )
        if self._changed(sql.ADD_GROUP, values) is None:
            return None
        num_samples = change.num_delivered + change.num_cancelled
        self._connection.execute(sql.SETTLE, (num_samples, change.request_id))
        return Books(num_delivered=change.num_delivered, num_cancelled=change.num_cancelled)

    def _end(self, change: Ended) -> Books | None:
        row = self._connection.execute(sql.READ_PENDING, (change.request_id,)).fetchone()
        if row is None:
            return None
        error = change.error
        told = (None, None, None) if error is None else (error.code, error.message, error.param)
        self._connection.execute(
            sql.END, (change.state.value, change.at_s, *told, change.request_id)
        )
        return settled_at_end(change, row[0])

    def _request(self, row: tuple[Any, ...]) -> KeptRequest:
        key, request_id, digest, body, num_groups, num_pending, state, code, message, param = row
        groups = tuple(_group(found) for found in self._connection.execute(sql.READ_GROUPS, (key,)))
        error = None if code is None else RecordedError(code=code, message=message, param=param)
        return KeptRequest(
            request_id=request_id,
            digest=digest,
            body=body,
            num_groups=num_groups,
            num_pending=num_pending,
            state=LedgerState(state),
            error=error,
            groups=groups,
        )


def _group(row: tuple[int, int, int, int, int, bytes]) -> KeptGroup:
    index, num_prompt_tokens, num_completion_tokens, num_draft_tokens, num_accepted, body = row
    return KeptGroup(
        prompt_index=index,
        body=body,
        usage=RolloutUsage(
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=num_completion_tokens,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted,
        ),
    )


def wal_of(path: Path) -> Path:
    """SQLite's write-ahead log of the file at ``path``."""
    return path.with_name(path.name + "-wal")
