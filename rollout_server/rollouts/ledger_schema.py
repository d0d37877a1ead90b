"""The tables of the ledger, and what is said to SQLite. Text only.

``requests`` has a row for every request that is unfinished or whose result is kept, ``groups`` one
for every finished group of those, in order of finishing; ``books`` is a single row of totals.
"""

from __future__ import annotations

from typing import Final

from rollout_server.rollouts.ledger_records import LedgerState, states_before

FORMAT: Final = 1
"""In ``user_version``. A file of a higher one is refused."""
APPLICATION_ID: Final = 0x534C4950
"""``SLIP``: tells a ledger from any other SQLite file."""

LOCK: Final = "PRAGMA locking_mode = EXCLUSIVE"
"""One server at a time, and no shared-memory file beside the two others. Comes first."""
SETTINGS: Final = (
    "PRAGMA journal_mode = WAL",
    # A commit is in the kernel's hands and outlives the process, kill -9 included; no fsync for
    # each. A machine that loses power may forget the last commits, never the order of them: what
    # is missing is run again, as it would be had the power gone a moment earlier.
    "PRAGMA synchronous = NORMAL",
    "PRAGMA journal_size_limit = 67108864",
    "PRAGMA foreign_keys = ON",
)

TABLES: Final = (
    """
    CREATE TABLE requests (
        key INTEGER PRIMARY KEY,
        request_id TEXT NOT NULL UNIQUE,
        digest BLOB NOT NULL,
        body BLOB NOT NULL,
        num_groups INTEGER NOT NULL,
        num_pending INTEGER NOT NULL CHECK (num_pending >= 0),
        state TEXT NOT NULL,
        accepted_at_s REAL NOT NULL,
        ended_at_s REAL,
        error_code TEXT,
        error_message TEXT,
        error_param TEXT
    )
    """,
    """
    CREATE TABLE groups (
        sequence INTEGER PRIMARY KEY,
        request_key INTEGER NOT NULL REFERENCES requests (key) ON DELETE CASCADE,
        prompt_index INTEGER NOT NULL,
        num_prompt_tokens INTEGER NOT NULL,
        num_completion_tokens INTEGER NOT NULL,
        num_draft_tokens INTEGER NOT NULL,
        num_accepted_tokens INTEGER NOT NULL,
        body BLOB NOT NULL,
        UNIQUE (request_key, prompt_index)
    )
    """,
    """
    CREATE TABLE books (
        num_accepted INTEGER NOT NULL,
        num_delivered INTEGER NOT NULL,
        num_failed INTEGER NOT NULL,
        num_cancelled INTEGER NOT NULL,
        num_starts INTEGER NOT NULL
    )
    """,
    "INSERT INTO books VALUES (0, 0, 0, 0, 0)",
)

COUNT_START: Final = "UPDATE books SET num_starts = num_starts + 1"
READ_BOOKS: Final = "SELECT num_accepted, num_delivered, num_failed, num_cancelled FROM books"
ADD_TO_BOOKS: Final = """
    UPDATE books SET
        num_accepted = num_accepted + ?, num_delivered = num_delivered + ?,
        num_failed = num_failed + ?, num_cancelled = num_cancelled + ?
"""


def _before(state: LedgerState) -> str:
    return ", ".join(f"'{before}'" for before in states_before(state))


ACCEPT: Final = f"""
    INSERT INTO requests (
        request_id, digest, body, num_groups, num_pending, state, accepted_at_s
    ) VALUES (?, ?, ?, ?, ?, '{LedgerState.ACCEPTED}', ?)
    ON CONFLICT (request_id) DO UPDATE SET
        digest = excluded.digest, body = excluded.body,
        num_pending = excluded.num_pending, state = excluded.state, ended_at_s = NULL,
        error_code = NULL, error_message = NULL, error_param = NULL
    WHERE state IN ({_before(LedgerState.ACCEPTED)})
"""
ADD_GROUP: Final = """
    INSERT OR IGNORE INTO groups (
        request_key, prompt_index, num_prompt_tokens, num_completion_tokens, num_draft_tokens,
        num_accepted_tokens, body
    ) SELECT key, ?, ?, ?, ?, ?, ? FROM requests
    WHERE request_id = ? AND state IN ('accepted', 'aborting')
"""
SETTLE: Final = "UPDATE requests SET num_pending = num_pending - ? WHERE request_id = ?"
ABORT: Final = f"""
    UPDATE requests SET state = '{LedgerState.ABORTING}'
    WHERE request_id = ? AND state IN ({_before(LedgerState.ABORTING)})
"""
READ_PENDING: Final = f"""
    SELECT num_pending FROM requests
    WHERE request_id = ? AND state IN ({_before(LedgerState.FINISHED)})
"""
END: Final = """
    UPDATE requests SET
        state = ?, num_pending = 0, ended_at_s = ?,
        error_code = ?, error_message = ?, error_param = ?
    WHERE request_id = ?
"""
FORGET: Final = "DELETE FROM requests WHERE request_id = ? AND state IN ('finished', 'failed')"
READ_REQUESTS: Final = """
    SELECT key, request_id, digest, body, num_groups, num_pending, state,
        error_code, error_message, error_param
    FROM requests ORDER BY coalesce(ended_at_s, accepted_at_s), key
"""
READ_GROUPS: Final = """
    SELECT prompt_index, num_prompt_tokens, num_completion_tokens, num_draft_tokens,
        num_accepted_tokens, body
    FROM groups WHERE request_key = ? ORDER BY sequence
"""
