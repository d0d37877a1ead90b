"""An engine's state, changed only along the written transitions. Pure."""

from __future__ import annotations

from shared.types import ENGINE_TRANSITIONS, EngineState


class EngineLifecycle:
    """Holds one engine's state and why it died."""

    def __init__(self) -> None:
        self._state = EngineState.STARTING
        self._error: str | None = None

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def error(self) -> str | None:
        return self._error

    def move(self, new_state: EngineState) -> None:
        """Change state.

        Raises:
            ValueError: the transition table has no such edge.
        """
        if new_state not in ENGINE_TRANSITIONS[self._state]:
            raise ValueError(f"engine cannot go from {self._state.value} to {new_state.value}")
        self._state = new_state

    def die(self, reason: str) -> None:
        """Reach DEAD from anywhere; the first reason is kept."""
        if self._state is not EngineState.DEAD:
            self._state = EngineState.DEAD
            self._error = reason
