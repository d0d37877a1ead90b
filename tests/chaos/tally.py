"""What a long run has counted so far, on disk, so that the next one goes on where it was ended."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.parts import save_json
from tests.chaos.checked_clients import SampleCounts
from tests.chaos.engine_kills import KillCounts

C = TypeVar("C", KillCounts, SampleCounts)


@dataclass(kw_only=True, slots=True)
class Tally:
    """Of kills of real processes."""

    kills: KillCounts = field(default_factory=KillCounts)
    samples: SampleCounts = field(default_factory=SampleCounts)
    leftover_files: int = 0
    """In shared memory."""

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            kills=_sum(self.kills, other.kills),
            samples=_sum(self.samples, other.samples),
            leftover_files=self.leftover_files + other.leftover_files,
        )


def save(path: Path, tally: Tally, commit: str) -> None:
    """Whole or not at all."""
    save_json(path, {"commit": commit, "tally": plain(tally)})


def plain(record: Any) -> dict[str, Any]:
    """Its fields as JSON has them (``asdict`` makes nonsense of counters)."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return {
        name: plain(value) if isinstance(value, KillCounts | SampleCounts) else value
        for name, value in values.items()
    }


def load(path: Path, commit: str) -> Tally:
    """What an earlier run left, or nothing.

    Raises:
        ValueError: it is of another commit; figures of two are figures of none.
    """
    if not path.exists():
        return Tally()
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["commit"] != commit:
        raise ValueError(f"{path} is of commit {document['commit']}, not {commit}: remove it")
    saved = document["tally"]
    return Tally(
        kills=_restored(KillCounts, saved["kills"]),
        samples=_restored(SampleCounts, saved["samples"]),
        leftover_files=saved["leftover_files"],
    )


def _sum(one: C, other: C) -> C:
    """Numbers, counters and lists of two records of one kind, added field by field."""
    names = [item.name for item in fields(one)]
    return type(one)(**{name: getattr(one, name) + getattr(other, name) for name in names})


def _restored(kind: type[C], saved: dict[str, Any]) -> C:
    values: dict[str, Any] = {
        name: Counter(value) if isinstance(value, dict) else value for name, value in saved.items()
    }
    return kind(**values)
