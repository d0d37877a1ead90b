"""The ledger's thread: batches, order, a full disk and its end; and a store that forgets."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from rollout_server.rollouts.ledger import NoLedger, RolloutLedger
from rollout_server.rollouts.ledger_opening import open_ledger_file
from rollout_server.rollouts.ledger_records import Books, Ended, Forgotten
from rollout_server.rollouts.ledger_writer import WriteOutcome
from rollout_server.router.accounting import SampleAccounts
from shared.errors import (
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    SlipstreamError,
    UnavailableError,
    error_of_code,
)
from tests.fakes.ledgers import accepted, finished, held_ledger
from tests.fakes.service import until

BIG = bytes(1 << 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.sqlite3"


async def test_what_waits_for_the_disk_goes_into_one_transaction(path: Path) -> None:
    ledger, file = held_ledger(path)
    file.may_write.clear()
    first = ledger.write(accepted("first"))
    await asyncio.sleep(0.05)  # the writer has it by now, alone
    rest = [ledger.write(accepted(f"r{index}")) for index in range(50)]
    assert ledger.stats.num_unwritten == 51
    file.may_write.set()
    assert set(await asyncio.gather(first, *rest)) == {WriteOutcome.WRITTEN}
    assert ledger.stats.num_commits <= 3
    assert ledger.stats.num_unwritten == 0
    assert ledger.stats.num_bytes > 0
    await ledger.close()
    assert len(open_ledger_file(path).read().unfinished) == 51


async def test_closing_writes_what_still_waits(path: Path) -> None:
    ledger, file = held_ledger(path)
    file.may_write.clear()
    waiting = [ledger.write(accepted(f"r{index}")) for index in range(300)]
    closing = asyncio.create_task(ledger.close())
    await asyncio.sleep(0.05)
    file.may_write.set()
    await closing
    assert len(open_ledger_file(path).read().unfinished) == len(waiting)
    assert await ledger.write(accepted("late")) is WriteOutcome.NOT_WRITTEN
    with pytest.raises(UnavailableError):
        await ledger.accept(accepted("late"))
    await ledger.close()


async def test_without_room_acceptances_are_refused_and_the_rest_is_written_later(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, file = held_ledger(path)
    await ledger.accept(accepted("a"))
    file.fill()
    group = ledger.write(finished("a", 0, body=BIG))
    assert await group is WriteOutcome.NOT_WRITTEN
    with pytest.raises(UnavailableError, match=r"rollouts\.sqlite3: database or disk is full"):
        await ledger.accept(accepted("b", body=BIG))
    assert ledger.stats.num_unwritten == 1
    assert ledger.stats.num_write_failures >= 2
    assert caplog.text.count("cannot be written") == 1, "said once, not at every attempt"
    file.make_room()
    await until(lambda: ledger.stats.num_unwritten == 0, "the group to be written")
    assert "can be written again" in caplog.text
    await ledger.accept(accepted("b"))
    await ledger.close()
    kept, other = open_ledger_file(path).read().unfinished
    assert [len(group.body) for group in kept.groups] == [len(BIG)]
    assert (other.request_id, other.num_pending) == ("b", 4)


async def test_one_request_too_large_for_the_disk_does_not_hold_up_the_groups_of_others(
    path: Path,
) -> None:
    ledger, file = held_ledger(path)
    await ledger.accept(accepted("a", num_groups=1))
    file.fill()
    file.may_write.clear()
    first = ledger.write(accepted("b", body=BIG))
    small = ledger.write(Ended(request_id="a", num_failed=0, error=None, at_s=1.0))
    file.may_write.set()
    assert await first is WriteOutcome.NOT_WRITTEN
    assert await small is WriteOutcome.WRITTEN
    assert ledger.stats.num_unwritten == 0
    await ledger.close()


async def test_what_is_lost_at_the_end_is_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, file = held_ledger(path)
    await ledger.accept(accepted("a"))
    file.fill()
    await ledger.write(finished("a", 0, body=BIG))
    with caplog.at_level(logging.ERROR):
        await ledger.close()
    assert "1 changes could not be written" in caplog.text


async def test_an_id_in_another_state_than_the_server_believes_is_not_accepted(path: Path) -> None:
    ledger = await RolloutLedger.open(path)
    await ledger.accept(accepted("a"))
    with pytest.raises(SlipstreamError, match="'a' in a state that the server does not"):
        await ledger.accept(accepted("a"))
    assert await ledger.write(Forgotten(request_id="a")) is WriteOutcome.WITHOUT_EFFECT
    await ledger.close()


async def test_its_contents_are_given_out_once(path: Path) -> None:
    ledger = await RolloutLedger.open(path)
    await ledger.accept(accepted("a"))
    await ledger.close()
    ledger = await RolloutLedger.open(path)
    assert len(ledger.take_contents().unfinished) == 1
    assert ledger.take_contents().unfinished == ()
    await ledger.close()


async def test_without_a_ledger_every_change_counts_as_written() -> None:
    ledger = NoLedger()
    await ledger.accept(accepted("a"))
    assert await ledger.write(finished("a", 0)) is WriteOutcome.WRITTEN
    assert ledger.take_contents().books == Books()
    assert ledger.stats.num_commits == 0


def test_reserved_room_counts_against_the_bound_and_not_as_accepted() -> None:
    accounts = SampleAccounts(max_pending_samples=10)
    accounts.reserve(6)
    assert (accounts.num_accepted, accounts.num_pending) == (0, 0)
    with pytest.raises(OverloadedError, match="5 samples on top of 6 pending ones"):
        accounts.reserve(5)
    accounts.admit(4)
    accounts.release(2)
    accounts.accept(6)
    assert (accounts.num_accepted, accounts.num_pending) == (10, 10)
    accounts.check()


def test_books_of_an_earlier_process_are_taken_up_above_the_bound() -> None:
    accounts = SampleAccounts(max_pending_samples=10)
    accounts.restore(Books(num_accepted=100, num_delivered=70, num_cancelled=10), num_pending=20)
    accounts.check()
    with pytest.raises(OverloadedError):
        accounts.accept(1)
    accounts.restore(Books(num_accepted=1), num_pending=0)
    assert accounts.num_unaccounted == 1
    with pytest.raises(AssertionError, match="accepted 101"):
        accounts.check()


@pytest.mark.parametrize("error", [EngineDeadError("x"), InvalidRequestError("x", param="n")])
def test_an_error_noted_by_its_code_is_answered_with_the_same_status(
    error: SlipstreamError,
) -> None:
    again = error_of_code(error.code, error.message, error.param)
    assert (again.code, again.status, again.message, again.param) == (
        error.code,
        error.status,
        error.message,
        error.param,
    )
    assert again.retry_after_s == error.retry_after_s
    assert type(error_of_code("unheard_of", "x", None)) is SlipstreamError
