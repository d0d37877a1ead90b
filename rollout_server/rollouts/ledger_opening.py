"""Opens the ledger's file: made where there is none, checked where there is one. Blocks."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from rollout_server.rollouts import ledger_schema as sql
from rollout_server.rollouts.ledger_file import LedgerFile, wal_of
from shared.errors import ConfigurationError

LOGGER = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 2.0
"""A killed server's locks go with it; this is for one that is just ending."""
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
"""``SQLITE_ERROR`` is a missing table or column: our format, and not as we make it."""


class _DamagedError(Exception):
    """The file can be read and is not whole."""


def open_ledger_file(path: Path) -> LedgerFile:
    """A file that is damaged is set aside, loudly, and a new one takes its place.

    Raises:
        ConfigurationError: it cannot be written, another server has it, or it is of a newer
            version or no ledger at all.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Prompts and completions are the owner's only; SQLite's other file follows this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise _unusable(path, exc.strerror or str(exc)) from exc
    try:
        return LedgerFile(path, _connect(path))
    except (sqlite3.Error, _DamagedError) as exc:
        if isinstance(exc, sqlite3.Error) and exc.sqlite_errorcode & 0xFF not in _DAMAGE:
            raise _unusable(path, str(exc)) from exc
        _set_aside(path, str(exc))
    try:
        return LedgerFile(path, _connect(path))
    except sqlite3.Error as exc:
        raise _unusable(path, str(exc)) from exc


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute(sql.LOCK).fetchall()
        _check_kind(path, connection)
        for setting in sql.SETTINGS:
            connection.execute(setting).fetchall()
        _make_tables(connection)
        _check_whole(connection)
        # Whether it can be written is known now, and not at the first request.
        connection.execute(sql.COUNT_START)
    except BaseException:  # an interrupt, too: the file must not stay locked
        connection.close()
        raise
    return connection


def _check_kind(path: Path, connection: sqlite3.Connection) -> None:
    """Changes nothing: another program's file stays as it is."""
    found_format = _number(connection, "PRAGMA user_version")
    application = _number(connection, "PRAGMA application_id")
    num_tables = _number(connection, "SELECT count(*) FROM sqlite_master")
    if application != sql.APPLICATION_ID and (application or found_format or num_tables):
        raise ConfigurationError(
            f"{path} is an SQLite file, but not a ledger of rollouts; move it away, or set "
            "server.ledger off",
            param="server.ledger",
        )
    if found_format > sql.FORMAT:
        raise ConfigurationError(
            f"{path} has format {found_format}, written by a newer version; this one reads up to "
            f"{sql.FORMAT}. Start the newer version, or move the file away to start without its "
            "requests",
            param="server.ledger",
        )


def _make_tables(connection: sqlite3.Connection) -> None:
    if _number(connection, "PRAGMA user_version") == sql.FORMAT:
        return
    connection.execute("BEGIN IMMEDIATE")
    for statement in sql.TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {sql.APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {sql.FORMAT}")
    connection.execute("COMMIT")


def _check_whole(connection: sqlite3.Connection) -> None:
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _DamagedError(found)
    if connection.execute(sql.READ_BOOKS).fetchone() is None:
        raise _DamagedError("its books are missing")
    connection.execute(sql.READ_REQUESTS).fetchone()
    connection.execute(sql.READ_GROUPS, (0,)).fetchone()


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    path.rename(aside)
    if wal_of(path).exists():
        wal_of(path).rename(wal_of(aside))
    LOGGER.error(
        "the ledger %s is damaged (%s): set aside as %s. Rollout requests accepted before are not "
        "known any more; clients that post them again start them anew",
        path,
        reason,
        aside.name,
    )


def _unusable(path: Path, reason: str) -> ConfigurationError:
    if "locked" in reason:
        reason = "another server has it open"
    return ConfigurationError(
        f"the ledger {path} cannot be used: {reason}. It lies in the run's directory (output_dir, "
        "name); server.ledger off keeps none, and a restart then forgets every request",
        param="server.ledger",
    )


def _number(connection: sqlite3.Connection, statement: str) -> int:
    (value,) = connection.execute(statement).fetchone()
    return int(value)
