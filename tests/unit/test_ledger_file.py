"""The ledger's file: transitions, books, formats, damage, and what another process may not do."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.rollouts import ledger_schema
from rollout_server.rollouts.ledger_file import LedgerFile, wal_of
from rollout_server.rollouts.ledger_opening import open_ledger_file
from rollout_server.rollouts.ledger_records import (
    LEDGER_TRANSITIONS,
    AbortAsked,
    Accepted,
    Books,
    Ended,
    Forgotten,
    GroupFinished,
    LedgerChange,
    LedgerState,
    RecordedError,
)
from shared.errors import ConfigurationError
from tests.fakes.ledgers import USAGE, accepted, as_after_a_kill, finished

ERROR = RecordedError(code="engine_error", message="bad step", param=None)


def ended(request_id: str, error: RecordedError | None = None, num_failed: int = 0) -> Ended:
    return Ended(request_id=request_id, num_failed=num_failed, error=error, at_s=2.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "rollouts.sqlite3"


@pytest.fixture
def file(path: Path) -> Iterator[LedgerFile]:
    it = open_ledger_file(path)
    yield it
    it.close()


def test_what_was_written_is_there_again_after_a_kill(
    file: LedgerFile, path: Path, tmp_path: Path
) -> None:
    file.apply([accepted("a"), accepted("b", num_groups=1), accepted("c")])
    file.apply([finished("a", 1, body=b"first"), finished("a", 0, body=b"second")])
    file.apply([ended("a"), finished("b", 0), ended("b", ERROR)])
    again = open_ledger_file(as_after_a_kill(path, tmp_path / "copy"))
    contents = again.read()
    again.close()
    assert [kept.request_id for kept in contents.unfinished] == ["c"]
    a, b = contents.ended
    assert [(g.prompt_index, g.body, g.usage) for g in a.groups] == [
        (1, b"first", USAGE),
        (0, b"second", USAGE),
    ]
    assert (a.state, a.error, a.num_pending) == (LedgerState.FINISHED, None, 0)
    assert (b.state, b.error) == (LedgerState.FAILED, ERROR)
    assert contents.books == Books(num_accepted=10, num_delivered=6)
    assert contents.unfinished[0].num_pending == 4 == contents.books.num_pending


def test_a_batch_is_applied_whole_or_not_at_all(file: LedgerFile) -> None:
    file.apply([accepted("a", num_groups=1, n=1)])
    with pytest.raises(sqlite3.IntegrityError):  # more samples than were accepted
        file.apply([accepted("b"), finished("a", 0, n=5)])
    assert [kept.request_id for kept in file.read().unfinished] == ["a"]
    assert file.read().books == Books(num_accepted=1)
    assert file.apply([finished("a", 0, n=1)]) == [True]


def test_a_group_is_recorded_once_and_counted_once(file: LedgerFile) -> None:
    file.apply([accepted("a")])
    assert file.apply([finished("a", 0, body=b"x"), finished("a", 0, body=b"y")]) == [True, False]
    (kept,) = file.read().unfinished
    assert [group.body for group in kept.groups] == [b"x"]
    assert file.read().books == Books(num_accepted=4, num_delivered=2)


def test_samples_in_no_group_fail_or_are_cancelled_when_their_request_ends(
    file: LedgerFile,
) -> None:
    file.apply([accepted("a", num_groups=4), finished("a", 0, num_cancelled=1)])
    file.apply([ended("a", ERROR, num_failed=2)])
    assert file.read().books == Books(
        num_accepted=8, num_delivered=1, num_failed=2, num_cancelled=1 + 4
    )


def test_a_failed_request_goes_on_with_the_groups_it_has(file: LedgerFile) -> None:
    file.apply([accepted("a"), finished("a", 0), ended("a", ERROR, num_failed=2)])
    again = Accepted(
        request_id="a", digest=b"e" * 16, body=b"{}", num_groups=2, num_samples=2, at_s=3.0
    )
    assert file.apply([again]) == [True]
    (kept,) = file.read().unfinished
    assert [group.prompt_index for group in kept.groups] == [0]
    assert (kept.error, kept.num_pending) == (None, 2)
    file.apply([finished("a", 1), ended("a")])
    assert file.read().books == Books(num_accepted=6, num_delivered=4, num_failed=2)


def test_what_is_forgotten_takes_no_room_and_stays_in_the_books(file: LedgerFile) -> None:
    body = bytes(1 << 20)
    for round_ in range(5):
        file.apply([accepted(f"a{round_}", 1), finished(f"a{round_}", 0, body=body)])
        file.apply([ended(f"a{round_}"), Forgotten(request_id=f"a{round_}")])
    assert file.read().ended == ()
    assert file.read().books == Books(num_accepted=10, num_delivered=10)
    file.close()
    assert file.num_bytes() < 2 << 20


def test_a_running_request_is_not_forgotten(file: LedgerFile) -> None:
    file.apply([accepted("a")])
    assert file.apply([Forgotten(request_id="a")]) == [False]
    assert len(file.read().unfinished) == 1


@pytest.mark.parametrize("before", LedgerState)
@pytest.mark.parametrize("after", list(LedgerState))
def test_only_written_transitions_have_an_effect(
    file: LedgerFile, before: LedgerState, after: LedgerState
) -> None:
    changes: dict[LedgerState, LedgerChange] = {
        LedgerState.ACCEPTED: accepted("a"),
        LedgerState.ABORTING: AbortAsked(request_id="a"),
        LedgerState.FINISHED: ended("a"),
        LedgerState.FAILED: ended("a", ERROR),
    }
    file.apply([accepted("a")])
    if before is not LedgerState.ACCEPTED:
        file.apply([changes[before]])
    assert file.apply([changes[after]]) == [after in LEDGER_TRANSITIONS[before]]


REQUEST_IDS = st.sampled_from(["a", "b"])
CHANGES = st.one_of(
    st.builds(accepted, REQUEST_IDS),
    st.builds(finished, REQUEST_IDS, st.integers(0, 1), num_cancelled=st.integers(0, 2)),
    st.builds(lambda name: AbortAsked(request_id=name), REQUEST_IDS),
    st.builds(ended, REQUEST_IDS, st.sampled_from([None, ERROR]), st.integers(0, 4)),
    st.builds(lambda name: Forgotten(request_id=name), REQUEST_IDS),
)


@settings(max_examples=60)
@given(batches=st.lists(st.lists(CHANGES, max_size=5), max_size=8))
def test_the_books_balance_after_any_history(
    batches: list[list[LedgerChange]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "rollouts.sqlite3"
    delivered: dict[tuple[str, int], int] = {}
    num_delivered = 0
    for batch in batches:
        file = open_ledger_file(path)
        try:
            for change, had_effect in zip(batch, file.apply(batch), strict=True):
                if had_effect and isinstance(change, GroupFinished):
                    num_delivered += change.num_delivered
                    key = (change.request_id, change.group.prompt_index)
                    delivered[key] = delivered.get(key, 0) + 1
                    assert delivered[key] == 1, "one group twice"
                if had_effect and isinstance(change, Forgotten):
                    delivered = {k: v for k, v in delivered.items() if k[0] != change.request_id}
            contents = file.read()
        finally:
            file.close()
        assert contents.books.num_pending == sum(k.num_pending for k in contents.unfinished)
        assert contents.books.num_delivered == num_delivered
        assert all(kept.num_pending == 0 for kept in contents.ended)


def test_a_ledger_of_a_newer_format_is_refused_and_left_alone(path: Path) -> None:
    open_ledger_file(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {ledger_schema.FORMAT + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"has format 2, written by a newer version.* 1\."):
        open_ledger_file(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="not a ledger of rollouts"):
        open_ledger_file(path)
    assert path.read_bytes() == before


def _no_database(path: Path) -> None:
    path.write_bytes(b"not a database, and longer than a header of SQLite" * 100)


def _torn_pages(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 512)


def _torn_leaf(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 512)


def _lost_table(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE groups")
    connection.close()


def _empty_books(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM books")
    connection.close()


@pytest.mark.parametrize(
    "damage", [_no_database, _torn_pages, _torn_leaf, _lost_table, _empty_books]
)
def test_a_damaged_file_is_set_aside_and_the_log_says_so(
    path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    file = open_ledger_file(path)
    file.apply([accepted("a", num_groups=300)])
    file.apply([finished("a", index, body=bytes(200)) for index in range(300)])
    file.close()
    assert callable(damage)
    damage(path)
    damaged = path.read_bytes()
    with caplog.at_level(logging.ERROR):
        file = open_ledger_file(path)
    assert file.read().unfinished == ()
    file.close()
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.name in caplog.text
    assert "is damaged" in caplog.text
    if damage is not _lost_table:  # SQLite may tidy up a file that it can read
        assert aside.read_bytes() == damaged


def test_a_torn_end_of_the_log_loses_the_last_transaction_and_nothing_else(
    file: LedgerFile, path: Path, tmp_path: Path
) -> None:
    file.apply([accepted("a")])
    file.apply([finished("a", 0, body=bytes(20_000))])
    copy = as_after_a_kill(path, tmp_path / "copy")
    with wal_of(copy).open("r+b") as wal:
        wal.truncate(wal_of(copy).stat().st_size - 5000)
    again = open_ledger_file(copy)
    (kept,) = again.read().unfinished
    assert kept.groups == ()
    assert again.read().books == Books(num_accepted=4)
    again.close()


def test_a_second_server_on_the_same_file_is_refused(file: LedgerFile, path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another server has it open"):
        open_ledger_file(path)


def test_a_place_that_cannot_be_used_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"rollouts\.sqlite3 cannot be used: File exists"):
        open_ledger_file(tmp_path / "file" / "rollouts.sqlite3")
    (tmp_path / "rollouts.sqlite3").mkdir()
    with pytest.raises(ConfigurationError, match="Is a directory"):
        open_ledger_file(tmp_path / "rollouts.sqlite3")


def test_prompts_and_completions_are_for_the_owner_only(file: LedgerFile, path: Path) -> None:
    file.apply([accepted("a")])
    for written in (path, wal_of(path)):
        assert stat.S_IMODE(written.stat().st_mode) == 0o600
