"""Counts of long runs as files: added up, kept after every kill, and taken up again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.parts import save_json

R = TypeVar("R")


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as JSON has it (``asdict`` makes nonsense of counters)."""
    return {item.name: getattr(record, item.name) for item in fields(record)}


def restored(kind: type[R], saved: dict[str, Any]) -> R:
    """The dataclass that ``plain`` was of."""
    values: dict[str, Any] = {
        name: Counter(value) if isinstance(value, dict) else value for name, value in saved.items()
    }
    return kind(**values)


def added(one: R, other: R) -> R:
    """Numbers, counters and lists of two records of one kind, field by field."""
    names = [item.name for item in fields(one)]  # type: ignore[arg-type]  # a dataclass
    return type(one)(**{name: getattr(one, name) + getattr(other, name) for name in names})


def save_records(path: Path, commit: str, **records: Any) -> None:
    """Whole or not at all."""
    saved = {name: plain(record) for name, record in records.items()}
    save_json(path, {"commit": commit, "records": saved})


def load_records(path: Path, commit: str) -> dict[str, dict[str, Any]]:
    """What ``save_records`` left there, or nothing.

    Raises:
        ValueError: it is of another commit; figures of two are figures of none.
    """
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["commit"] != commit:
        raise ValueError(f"{path} is of commit {document['commit']}, not {commit}: remove it")
    records: dict[str, dict[str, Any]] = document["records"]
    return records
