"""An operator's pause of one engine, beside the pauses of pushes."""

from __future__ import annotations

import asyncio
import time

from rollout_server.engine.lifecycle import EngineLifecycle
from shared.errors import EngineError
from shared.types import EngineState

POLL_S = 0.02


class OperatorPause:
    """Moves the engine between SERVING and PAUSED, and remembers a pause for one that starts.

    A push leaves an engine as it found it, so that whoever pauses or resumes waits for its end.

    Args:
        sync_timeout_s: longest that a push may hold the engine.
    """

    def __init__(self, engine_id: str, lifecycle: EngineLifecycle, sync_timeout_s: float) -> None:
        self._engine_id = engine_id
        self._lifecycle = lifecycle
        self._sync_timeout_s = sync_timeout_s
        self.serve_as = EngineState.SERVING
        """What an engine becomes that has started."""
        self._wanted = EngineState.SERVING
        """By whoever asked last: those who still wait for a push may go on in any order."""

    async def change(self, new_state: EngineState) -> bool:
        """To PAUSED or back to SERVING, from the other or from STARTING.

        Returns:
            Whether this is still what is wanted, and to be told to vLLM.

        Raises:
            EngineError: a push did not end in time.
        """
        self._wanted = new_state
        deadline_s = time.monotonic() + self._sync_timeout_s
        while self._lifecycle.state is EngineState.SYNCING:
            if time.monotonic() > deadline_s:
                raise EngineError(
                    f"waited {self._sync_timeout_s:g} s (weights.pause_timeout_s + "
                    f"commit_timeout_s) for the push on engine {self._engine_id} to end"
                )
            await asyncio.sleep(POLL_S)
        if self._wanted is not new_state:
            return False
        if self._lifecycle.state is EngineState.STARTING:
            self.serve_as = new_state
        elif {self._lifecycle.state, new_state} == {EngineState.SERVING, EngineState.PAUSED}:
            self._lifecycle.move(new_state)
        return True
