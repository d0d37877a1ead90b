"""Which engine had the last turn of a conversation. Pure."""

from __future__ import annotations

from collections import OrderedDict

MAX_SESSIONS = 100_000
"""The longest silent ones are forgotten: they only lose their place, not their answer."""


class SessionMap:
    """From session to engine, least recently used first."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._engines: OrderedDict[str, str] = OrderedDict()

    def engine_of(self, session_id: str | None) -> str | None:
        """None for no session and for an unknown one."""
        return None if session_id is None else self._engines.get(session_id)

    def note(self, session_id: str | None, engine_id: str) -> None:
        """Its latest turn runs there."""
        if session_id is None:
            return
        self._engines[session_id] = engine_id
        self._engines.move_to_end(session_id)
        while len(self._engines) > self._max_sessions:
            self._engines.popitem(last=False)
