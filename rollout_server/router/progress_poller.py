"""Asks engines, every now and then, what their unfinished groups have, so that it outlives them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from rollout_server.engine.protocol import EngineHandle
from rollout_server.router.live_group import LiveGroup, abort_on_engine
from shared.errors import EngineError

LOGGER = logging.getLogger(__name__)


class ProgressPoller:
    """One question at a time and engine, over all its groups; answers hold only what is new.

    Args:
        live_groups: every group that is not answered.
        on_tokens: told of every group that has new ones.
    """

    def __init__(
        self,
        live_groups: Callable[[], Iterable[LiveGroup]],
        interval_s: float,
        on_tokens: Callable[[LiveGroup], None] = lambda group: None,
    ) -> None:
        self._live_groups = live_groups
        self._on_tokens = on_tokens
        self._interval_s = interval_s
        self._questions: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                self._ask_all()
        finally:
            for question in self._questions.values():
                question.cancel()

    def _ask_all(self) -> None:
        groups_of: defaultdict[EngineHandle, list[LiveGroup]] = defaultdict(list)
        for group in self._live_groups():
            if group.placement is None or group.work is None or not group.pieces:
                continue
            # A probe's first token opens the engine to others; an abort may have come too early.
            is_asked = group.work.needs_news or group.is_aborted
            if is_asked or group.placement.ticket.is_probe:
                groups_of[group.placement.handle].append(group)
        self._questions = {name: task for name, task in self._questions.items() if not task.done()}
        for handle, groups in groups_of.items():
            if handle.engine_id not in self._questions:
                self._questions[handle.engine_id] = asyncio.create_task(
                    ask(handle, groups, self._on_tokens), name=f"progress {handle.engine_id}"
                )


async def ask(
    handle: EngineHandle, groups: Iterable[LiveGroup], on_tokens: Callable[[LiveGroup], None]
) -> None:
    """Take what the engine has of these groups into their work."""
    asked = {
        piece.request.request_id: (group, piece, group.work)
        for group in groups
        if group.work is not None
        for piece in group.pieces
    }
    known = {request_id: work.known(piece) for request_id, (_, piece, work) in asked.items()}
    try:
        progress = await handle.progress(known)
    except EngineError as exc:
        # It is slow, or dead: what its groups go through tells; this was only for their sake.
        LOGGER.debug("engine %s did not tell its progress: %s", handle.engine_id, exc.message)
        return
    for request_id, news in progress.items():
        group, piece, work = asked[request_id]
        # Answered meanwhile, or already with another engine?
        if any(piece is current for current in group.pieces):
            work.note(piece, news)
            if news:
                on_tokens(group)
            if (group.is_aborted or work.has_enough) and work.num_unfinished:
                await abort_on_engine(handle, group)
