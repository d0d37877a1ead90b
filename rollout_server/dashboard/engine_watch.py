"""The tracks of the engines there are, and which engines are gone and why."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from rollout_server.dashboard.engine_track import EngineTrack
from rollout_server.engine.protocol import EngineHandle
from shared.schemas.dashboard import DepartedEngine, KvPoint
from shared.schemas.engines import EngineStatus
from shared.schemas.speculation import EngineSpeculation
from shared.types import EngineState

MAX_DEPARTED = 10


class EngineWatch:
    """Looks at the pool at every tick."""

    def __init__(self) -> None:
        self._tracks: dict[str, EngineTrack] = {}
        self._seen: dict[str, tuple[EngineHandle, EngineState]] = {}
        self._departed: deque[DepartedEngine] = deque(maxlen=MAX_DEPARTED)

    @property
    def departed(self) -> list[DepartedEngine]:
        """The latest, oldest first."""
        return list(self._departed)

    def points(self, engine_id: str) -> list[KvPoint]:
        """All points of an engine that are kept."""
        track = self._tracks.get(engine_id)
        return [] if track is None else track.points

    def tokens_per_s(self, engine_id: str) -> float:
        """0 for an engine not seen yet."""
        track = self._tracks.get(engine_id)
        return 0.0 if track is None else track.tokens_per_s

    def last_step(self, engine_id: str) -> int:
        """Of the decisions seen so far; 0 before the first."""
        track = self._tracks.get(engine_id)
        return 0 if track is None else track.last_step

    def add_decisions(self, report: EngineSpeculation) -> None:
        """Of an engine that was there at the last tick; those of others are asked for again."""
        track = self._tracks.get(report.engine_id)
        if track is not None:
            track.add_decisions(report.history)

    def tick(
        self, time_s: float, statuses: Sequence[EngineStatus], draft_lengths: Mapping[str, int]
    ) -> dict[str, list[KvPoint]]:
        """New points by engine id."""
        return {
            status.engine_id: self._tracks.setdefault(status.engine_id, EngineTrack()).tick(
                time_s, status, draft_lengths.get(status.engine_id, 0)
            )
            for status in statuses
        }

    def look_for_departed(
        self, time_s: float, engines: Sequence[EngineHandle]
    ) -> list[DepartedEngine]:
        """Engines that the pool no longer has. Their handles still know why."""
        present = {engine.engine_id for engine in engines}
        departed = [
            DepartedEngine(
                engine_id=engine_id, time_s=time_s, last_state=last_state, reason=engine.error
            )
            for engine_id, (engine, last_state) in self._seen.items()
            if engine_id not in present
        ]
        for gone in departed:
            self._tracks.pop(gone.engine_id, None)
        self._departed.extend(departed)
        self._seen = {
            engine.engine_id: (engine, self._last_state_alive(engine)) for engine in engines
        }
        return departed

    def _last_state_alive(self, engine: EngineHandle) -> EngineState:
        if engine.state is not EngineState.DEAD or engine.engine_id not in self._seen:
            return engine.state
        return self._seen[engine.engine_id][1]
