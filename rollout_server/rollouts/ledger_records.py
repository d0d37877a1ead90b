"""What the ledger keeps: the states of a request, the changes to it, and the books. Pure.

A change says what happened; ``ledger_file`` applies it. Changes that do not follow
``LEDGER_TRANSITIONS`` have no effect, so that applying one twice is as good as once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rollout_server.rollouts.kept_groups import KeptGroup


class LedgerState(StrEnum):
    """Where a recorded request stands."""

    ACCEPTED = "accepted"
    """Runs, or is to be run again after a restart."""
    ABORTING = "aborting"
    """A caller has ended it: what is missing is never generated, after a restart neither."""
    FINISHED = "finished"
    FAILED = "failed"
    """Ended by an error; posted again it goes on with the groups that are missing."""


LEDGER_TRANSITIONS: dict[LedgerState, frozenset[LedgerState]] = {
    LedgerState.ACCEPTED: frozenset(
        {LedgerState.ABORTING, LedgerState.FINISHED, LedgerState.FAILED}
    ),
    LedgerState.ABORTING: frozenset({LedgerState.FINISHED, LedgerState.FAILED}),
    LedgerState.FINISHED: frozenset(),
    LedgerState.FAILED: frozenset({LedgerState.ACCEPTED}),
}
UNFINISHED = frozenset({LedgerState.ACCEPTED, LedgerState.ABORTING})


def states_before(state: LedgerState) -> list[str]:
    """Values of the states from which a request may come into ``state``."""
    return [before.value for before, after in LEDGER_TRANSITIONS.items() if state in after]


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A request was taken on, for the first time or again after it had failed."""

    request_id: str
    digest: bytes
    body: bytes
    """JSON of what was asked for, without the id and how it is delivered."""
    num_groups: int
    num_samples: int
    """Of the groups that are not there yet."""
    at_s: float
    """Unix time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFinished:
    """A group is about to be delivered."""

    request_id: str
    group: KeptGroup
    num_delivered: int
    num_cancelled: int
    """Samples that were aborted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortAsked:
    """A caller wants no more of it."""

    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedError:
    """Enough of an error of ours to answer it again."""

    code: str
    message: str
    param: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """Nothing more is to come. Samples that were in no group failed, the others were cancelled."""

    request_id: str
    num_failed: int
    error: RecordedError | None
    at_s: float
    """Unix time."""

    @property
    def state(self) -> LedgerState:
        return LedgerState.FINISHED if self.error is None else LedgerState.FAILED


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """The result is no longer kept (age or size); the books remember its samples."""

    request_id: str


LedgerChange = Accepted | GroupFinished | AbortAsked | Ended | Forgotten


def size_of(change: LedgerChange) -> int:
    """Bytes it brings, roughly."""
    match change:
        case Accepted():
            return len(change.body)
        case GroupFinished():
            return len(change.group.body)
        case _:
            return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """Samples of all requests ever recorded, those forgotten since included."""

    num_accepted: int = 0
    num_delivered: int = 0
    num_failed: int = 0
    num_cancelled: int = 0

    @property
    def num_pending(self) -> int:
        return self.num_accepted - self.num_delivered - self.num_failed - self.num_cancelled

    def __add__(self, other: Books) -> Books:
        return Books(
            num_accepted=self.num_accepted + other.num_accepted,
            num_delivered=self.num_delivered + other.num_delivered,
            num_failed=self.num_failed + other.num_failed,
            num_cancelled=self.num_cancelled + other.num_cancelled,
        )


def settled_at_end(ended: Ended, num_pending: int) -> Books:
    """How the samples end that are in no group when their request ends."""
    num_failed = min(ended.num_failed, num_pending)
    return Books(num_failed=num_failed, num_cancelled=num_pending - num_failed)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptRequest:
    """A request as it is found after a restart."""

    request_id: str
    digest: bytes
    body: bytes
    num_groups: int
    num_pending: int
    """Samples that have not ended."""
    state: LedgerState
    error: RecordedError | None
    groups: tuple[KeptGroup, ...]
    """In order of finishing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerContents:
    """All of it; unfinished requests in order of acceptance, ended ones in order of ending."""

    books: Books
    unfinished: tuple[KeptRequest, ...]
    ended: tuple[KeptRequest, ...]
