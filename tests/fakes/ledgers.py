"""Ledgers of servers that are killed, and disks that are slow or full."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from rollout_server.rollouts.kept_groups import KeptGroup
from rollout_server.rollouts.ledger import RolloutLedger
from rollout_server.rollouts.ledger_file import LedgerFile, wal_of
from rollout_server.rollouts.ledger_opening import open_ledger_file
from rollout_server.rollouts.ledger_records import Accepted, GroupFinished, LedgerChange
from rollout_server.rollouts.ledger_writer import LedgerWriter
from shared.schemas.rollouts import RolloutUsage

USAGE = RolloutUsage(
    num_prompt_tokens=2, num_completion_tokens=12, num_draft_tokens=8, num_accepted_tokens=6
)


def as_after_a_kill(path: Path, directory: Path) -> Path:
    """The file as a process that is killed now would leave it, while its server lives on."""
    directory.mkdir(parents=True, exist_ok=True)
    for source in (path, wal_of(path)):
        if source.exists():
            shutil.copy(source, directory / source.name)
    return directory / path.name


class HeldFile(LedgerFile):
    """Writes nothing while ``may_write`` is clear."""

    def __init__(self, file: LedgerFile) -> None:
        super().__init__(file.path, file._connection)
        self.may_write = threading.Event()
        self.may_write.set()

    def apply(self, changes: Sequence[LedgerChange]) -> list[bool]:
        assert self.may_write.wait(10), "waited 10 s to be let write"
        return super().apply(changes)

    def fill(self) -> None:
        """No page more: SQLite says what it says when the disk is full."""
        (num_pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        self._connection.execute(f"PRAGMA max_page_count = {num_pages}")

    def make_room(self) -> None:
        self._connection.execute("PRAGMA max_page_count = 1000000")


def held_ledger(path: Path) -> tuple[RolloutLedger, HeldFile]:
    """A ledger over a file that tests hold and fill."""
    file = HeldFile(open_ledger_file(path))
    return RolloutLedger(LedgerWriter(file), file.read(), file.num_bytes()), file


def accepted(request_id: str, num_groups: int = 2, n: int = 2, body: bytes = b"{}") -> Accepted:
    return Accepted(
        request_id=request_id,
        digest=b"d" * 16,
        body=body,
        num_groups=num_groups,
        num_samples=num_groups * n,
        at_s=1.0,
    )


def finished(
    request_id: str, prompt_index: int, *, body: bytes = b"{}", n: int = 2, num_cancelled: int = 0
) -> GroupFinished:
    return GroupFinished(
        request_id=request_id,
        group=KeptGroup(prompt_index=prompt_index, body=body, usage=USAGE),
        num_delivered=n - num_cancelled,
        num_cancelled=num_cancelled,
    )
