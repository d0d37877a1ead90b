"""Looks for late groups, every now and then, and has their last samples go on elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from rollout_server.router.dispatch_queue import DispatchQueue
from rollout_server.router.group_work import GroupWork
from rollout_server.router.live_group import LiveGroup, abort_on_engine
from rollout_server.router.reservations import room_for
from rollout_server.router.stragglers import StragglerLimits, TypicalTime, is_late
from shared.logging import log_context
from shared.types import EngineState

LOGGER = logging.getLogger(__name__)


class StragglerWatch:
    """Tells engines to stop late groups, with room reserved elsewhere; the router does the rest.

    Args:
        limits: None leaves every group where it is.
        live_groups: every group that is not answered.
    """

    def __init__(
        self,
        limits: StragglerLimits | None,
        queue: DispatchQueue,
        live_groups: Callable[[], Iterable[LiveGroup]],
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.num_handed_over = 0
        """Samples."""
        self.num_recomputed_tokens = 0
        """What that has cost: tokens, prompts included, that another engine had to prefill."""
        self._limits = limits
        self._queue = queue
        self._live_groups = live_groups
        self._interval_s = interval_s
        self._clock = clock
        self._typical = TypicalTime()
        self._stops: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while self._limits is not None:
                await asyncio.sleep(self._interval_s)
                for group in list(self._live_groups()):
                    self._look_at(group, self._limits)
        finally:
            for stop in self._stops:
                stop.cancel()

    def group_finished(self, live: LiveGroup) -> None:
        """It tells how long groups take."""
        if live.since_s is not None:
            self._typical.note(self._clock() - live.since_s)

    def group_left(self, work: GroupWork) -> None:
        """Its engine has stopped it, and it goes on elsewhere."""
        self.num_handed_over += work.num_unfinished
        self.num_recomputed_tokens += sum(
            len(piece.request.prompt_token_ids) for piece in work.pieces()
        )

    def _look_at(self, group: LiveGroup, limits: StragglerLimits) -> None:
        work, handle = group.work, group.handle
        if work is None or handle is None or group.since_s is None or not group.pieces:
            return
        # One that is paused or in a commit is late for a reason that will pass.
        if group.is_aborted or not work.may_hand_over or handle.state is not EngineState.SERVING:
            return
        num_unfinished, running_s = work.num_unfinished, self._clock() - group.since_s
        typical_s = self._typical.typical_s
        if num_unfinished == 0 or not is_late(num_unfinished, running_s, typical_s, limits):
            return
        needed = room_for(group.request, num_unfinished)
        group.ahead = self._queue.reserve_elsewhere(handle.engine_id, needed)
        if group.ahead is None:
            return
        group.late_on = handle.engine_id
        work.begin_handover()
        with log_context(group_id=group.request.request_id, engine_id=handle.engine_id):
            LOGGER.info(
                "%d samples are unfinished after %.1f s, where groups take %.1f s: handed over "
                "from %s to %s (server.stragglers)",
                num_unfinished,
                running_s,
                typical_s,
                handle.engine_id,
                group.ahead.handle.engine_id,
            )
        # Not awaited: an engine that is slow to stop this group must not hold up the others.
        stop = asyncio.create_task(abort_on_engine(handle, group), name="straggler-stop")
        self._stops.add(stop)
        stop.add_done_callback(self._stops.discard)
