"""One attempt of a group: everything that is unfinished, on one engine."""

from __future__ import annotations

import asyncio

from rollout_server.engine.protocol import EngineHandle, GenerateResult
from rollout_server.router.group_work import GroupWork, Piece
from rollout_server.router.live_group import LiveGroup, abort_on_engine
from shared.errors import EngineDeadError
from shared.logging import log_context


async def attempt_group(handle: EngineHandle, work: GroupWork, live: LiveGroup) -> GenerateResult:
    """The result of what took longest; ``work`` has them all.

    Raises:
        EngineDeadError: of what had come back before, nothing is lost.
        EngineError: the engine failed on one of the requests.
    """
    live.pieces = work.pieces()
    live.request_ids = tuple(piece.request.request_id for piece in live.pieces)

    async def run(piece: Piece) -> GenerateResult:
        result = await handle.generate(piece.request)
        work.take(piece, result)
        return result

    try:
        with log_context(engine_id=handle.engine_id):
            outcomes = await asyncio.gather(*map(run, live.pieces), return_exceptions=True)
    except asyncio.CancelledError:
        # Nobody wants the answer any more: stop the engine working on it.
        await abort_on_engine(handle, live)
        raise
    finally:
        live.pieces = []
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        # An error of the request itself will not be better on another engine.
        raise min(errors, key=lambda error: isinstance(error, EngineDeadError))
    results = [outcome for outcome in outcomes if isinstance(outcome, GenerateResult)]
    return max(results, key=lambda result: result.generate_s)
