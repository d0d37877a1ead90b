"""Weight pushes as the dashboard lists them. Pure but for what it remembers."""

from __future__ import annotations

from collections import deque

from shared.schemas.dashboard import CommitMark, PushRow
from shared.schemas.weights import PublishResponse, WeightsResponse

MAX_COMMITS = 200
MAX_PUSHES = 20


class PushWatch:
    """Joins the coordinator's history with the phases of pushes whose answer this server gave."""

    def __init__(self) -> None:
        self._responses: deque[PublishResponse] = deque(maxlen=MAX_PUSHES)
        self._commits: deque[CommitMark] = deque(maxlen=MAX_COMMITS)
        self._committed_version: int | None = None
        self._last_rows: list[PushRow] = []

    @property
    def commits(self) -> list[CommitMark]:
        """The latest, oldest first."""
        return list(self._commits)

    def observe(self, response: PublishResponse) -> None:
        """A committed push."""
        self._responses.append(response)

    def look_for_commit(self, time_s: float, version: int) -> list[CommitMark]:
        """A mark when ``version`` is not what was committed at the last tick."""
        last, self._committed_version = self._committed_version, version
        if last is None or version == last:
            return []
        mark = (time_s, version)
        self._commits.append(mark)
        return [mark]

    def new_rows(self, weights: WeightsResponse) -> list[PushRow] | None:
        """All rows, or None while they are what they were at the last tick."""
        rows = self.rows(weights)
        changed, self._last_rows = rows != self._last_rows, rows
        return rows if changed else None

    def rows(self, weights: WeightsResponse) -> list[PushRow]:
        """The latest pushes, oldest first."""
        responses = {response.version: response for response in self._responses}
        rows = []
        for entry in weights.history[-MAX_PUSHES:]:
            response = responses.get(entry.version) if entry.committed else None
            pauses = [] if response is None else [engine.paused_s for engine in response.engines]
            rows.append(
                PushRow(
                    version=entry.version,
                    committed=entry.committed,
                    total_s=entry.total_s,
                    error=entry.error,
                    phases_s={} if response is None else response.phases_s,
                    paused_s=max(pauses, default=None),
                )
            )
        return rows
