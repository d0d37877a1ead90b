"""What a run of kills has counted so far, on disk, so that the next one goes on where it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.checked_clients import SampleCounts
from tests.chaos.engine_kills import KillCounts
from tests.chaos.records import added, load_records, restored, save_records


@dataclass(kw_only=True, slots=True)
class Tally:
    """Of kills of real processes."""

    kills: KillCounts = field(default_factory=KillCounts)
    samples: SampleCounts = field(default_factory=SampleCounts)

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            kills=added(self.kills, other.kills), samples=added(self.samples, other.samples)
        )


def save(path: Path, tally: Tally, commit: str) -> None:
    """Whole or not at all."""
    save_records(path, commit, kills=tally.kills, samples=tally.samples)


def load(path: Path, commit: str) -> Tally:
    """What an earlier run left, or nothing.

    Raises:
        ValueError: it is of another commit.
    """
    saved = load_records(path, commit)
    if not saved:
        return Tally()
    return Tally(
        kills=restored(KillCounts, saved["kills"]), samples=restored(SampleCounts, saved["samples"])
    )
