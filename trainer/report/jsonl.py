"""Reading JSON-lines files that another process may still be writing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

JsonRecord = Mapping[str, object]


class JsonlTail:
    """Follows one growing file: each call returns the records that were completed since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset_bytes = 0

    def read_new(self) -> list[JsonRecord]:
        """Complete new records; nothing while the file is absent. Broken lines are skipped."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset_bytes)
                content = file.read()
        except OSError:
            return []
        # The writer may be in the middle of a line: that line waits for the next call.
        complete = content[: content.rfind(b"\n") + 1]
        self._offset_bytes += len(complete)
        return [record for line in complete.splitlines() if (record := parse_line(line))]


def iterate_jsonl(path: Path) -> Iterator[JsonRecord]:
    """Records of a file, one at a time; empty when it is absent. Broken lines are skipped."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            if record := parse_line(line):
                yield record


def parse_line(line: bytes) -> JsonRecord | None:
    """The JSON object of a line; None for anything else (a crash may cut or garble a line)."""
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def number(record: JsonRecord, key: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def text(record: JsonRecord, key: str) -> str:
    """A string of a record; empty when it is absent."""
    value = record.get(key)
    return "" if value is None else str(value)
