"""What operators and trainers ask of the control plane: engines, pauses, speculation, weights.

The lower half of both clients; their upper half brings connections and retries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from shared.client import calls
from shared.client.async_connection import AsyncConnection
from shared.client.attempts import Attempts
from shared.client.bodies import AnswerT
from shared.client.calls import Call
from shared.client.connection import Connection
from shared.schemas.engines import EnginesResponse
from shared.schemas.operations import VersionResponse
from shared.schemas.speculation import SpeculationResponse
from shared.schemas.weights import WeightsResponse
from shared.types import PauseMode


class ControlCalls(ABC):
    """Calls with small answers; each is repeated while the server is away, unless it says so."""

    _connection: Connection

    @abstractmethod
    def _run(self, call: Call[AnswerT], attempts: Attempts | None = None) -> AnswerT: ...

    def weights(self) -> WeightsResponse:
        """Which version is committed."""
        return self._run(calls.weights())

    def speculation(self, since_step: int) -> SpeculationResponse:
        """Decisions of every engine after ``since_step``. One attempt: pollers come again."""
        return self._connection.send(calls.speculation(since_step))

    def engines(self) -> EnginesResponse:
        """Every engine with its state, load and versions."""
        return self._run(calls.engines())

    def scale(self, count: int, pool: str | None = None) -> EnginesResponse:
        """Ask for ``count`` engines; they start and drain in the background.

        Args:
            pool: which of the server's pools; may be left out where there is one.
        """
        return self._run(calls.scale(count, pool))

    def drain_engine(self, engine_id: str, *, replace: bool = True) -> EnginesResponse:
        """Let an engine finish what it has, then stop it; ``replace`` starts another now.

        One attempt: a second might find it gone.
        """
        return self._connection.send(calls.drain_engine(engine_id, replace))

    def remove_engine(self, engine_id: str, *, replace: bool = True) -> EnginesResponse:
        """Stop an engine now; its groups go on elsewhere. One attempt."""
        return self._connection.send(calls.remove_engine(engine_id, replace))

    def pause(
        self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = calls.STATUS_TIMEOUT_S
    ) -> EnginesResponse:
        """Stop generating on every engine; under ``wait`` give the time that may take."""
        return self._run(calls.pause(mode, timeout_s))

    def resume(self) -> EnginesResponse:
        """Generate again after ``pause``."""
        return self._run(calls.resume())

    def version(self) -> VersionResponse:
        """Versions, the served model and the known rewards."""
        return self._run(calls.version())


class AsyncControlCalls(ABC):
    """The same, for an event loop."""

    _connection: AsyncConnection

    @abstractmethod
    async def _run(self, call: Call[AnswerT], attempts: Attempts | None = None) -> AnswerT: ...

    async def weights(self) -> WeightsResponse:
        """Which version is committed."""
        return await self._run(calls.weights())

    async def speculation(self, since_step: int) -> SpeculationResponse:
        """Decisions of every engine after ``since_step``. One attempt: pollers come again."""
        return await self._connection.send(calls.speculation(since_step))

    async def engines(self) -> EnginesResponse:
        """Every engine with its state, load and versions."""
        return await self._run(calls.engines())

    async def scale(self, count: int, pool: str | None = None) -> EnginesResponse:
        """Ask for ``count`` engines; they start and drain in the background.

        Args:
            pool: which of the server's pools; may be left out where there is one.
        """
        return await self._run(calls.scale(count, pool))

    async def drain_engine(self, engine_id: str, *, replace: bool = True) -> EnginesResponse:
        """Let an engine finish what it has, then stop it; ``replace`` starts another now.

        One attempt: a second might find it gone.
        """
        return await self._connection.send(calls.drain_engine(engine_id, replace))

    async def remove_engine(self, engine_id: str, *, replace: bool = True) -> EnginesResponse:
        """Stop an engine now; its groups go on elsewhere. One attempt."""
        return await self._connection.send(calls.remove_engine(engine_id, replace))

    async def pause(
        self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = calls.STATUS_TIMEOUT_S
    ) -> EnginesResponse:
        """Stop generating on every engine; under ``wait`` give the time that may take."""
        return await self._run(calls.pause(mode, timeout_s))

    async def resume(self) -> EnginesResponse:
        """Generate again after ``pause``."""
        return await self._run(calls.resume())

    async def version(self) -> VersionResponse:
        """Versions, the served model and the known rewards."""
        return await self._run(calls.version())
