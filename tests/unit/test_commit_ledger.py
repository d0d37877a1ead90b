"""When a record counts as written, on disks that fail."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.weights.commit_ledger import CommitLedger, CommitRecord
from shared.errors import WeightTransferError


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[CommitLedger]:
    ledger = CommitLedger(tmp_path / "state")
    ledger.write(CommitRecord(version=1, path="one"))
    yield ledger
    ledger.close()


def fail(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_record_that_is_in_place_is_committed_even_if_its_directory_cannot_be_synced(
    ledger: CommitLedger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rollout_server.weights.commit_ledger.sync_directory", fail)
    with caplog.at_level(logging.ERROR):
        ledger.write(CommitRecord(version=2, path="two"))
    assert ledger.read() == CommitRecord(version=2, path="two")
    assert "version 2 is committed" in caplog.text
    assert "Input/output error" in caplog.text


def test_a_record_that_does_not_reach_the_disk_leaves_the_one_before(
    ledger: CommitLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.weights.commit_ledger.os.fsync", fail)
    with pytest.raises(WeightTransferError, match=r"version 2 cannot be recorded.*Input/output"):
        ledger.write(CommitRecord(version=2, path="two"))
    assert ledger.read() == CommitRecord(version=1, path="one")
    assert sorted(path.name for path in ledger.state_dir.iterdir()) == ["committed.json", "lock"]
