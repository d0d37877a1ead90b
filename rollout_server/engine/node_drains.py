"""Nodes that Ray is about to lose, and the engines on them. The decisions are pure.

A spot instance that its cloud takes back, a node that an autoscaler or an operator removes: Ray
hears of it before it happens, marks the node as draining, places nothing there any more, and says
when it goes, if that is known. The pool then drains the engines of that node and starts others
elsewhere, while what they hold is still being finished.

Example, with ``engine.drain_timeout_s`` 120::

    the node goes at no known time   -> its engines have 120 s to finish what they hold
    it goes in 300 s                 -> 120 s
    it goes in 30 s                  -> 25 s; what is unfinished then goes on elsewhere
    it goes in 3 s                   -> what they hold goes on elsewhere at once
    an engine there starts or is in a commit   -> looked at again with the next question
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from rollout_server.engine.pool_plan import DRAINABLE_STATES
from rollout_server.engine.pooled_engine import PooledEngine
from shared.errors import SlipstreamError

LOGGER = logging.getLogger(__name__)

STOP_MARGIN_S = 5.0
"""Engines stop so long before their node goes, so that they can still tell what they have."""

AskDrainingNodes = Callable[[], Mapping[str, float | None]]
"""Draining nodes by id, with the Unix time at which they go; None where that is not known. Blocks.

Raises ``SlipstreamError`` when the cluster does not answer.
"""


def leaving_engines(
    engines: Iterable[PooledEngine], draining: Mapping[str, float | None]
) -> list[PooledEngine]:
    """Those to drain now."""
    return [e for e in engines if e.node_id in draining and e.state in DRAINABLE_STATES]


def drain_time_s(drain_timeout_s: float, goes_at_s: float | None, now_s: float) -> float:
    """How long an engine may finish what it has.

    Args:
        goes_at_s: when its node goes; None where that is not known. Unix time, as Ray gives it.
        now_s: the same.
    """
    if goes_at_s is None:
        return drain_timeout_s
    return min(drain_timeout_s, max(0.0, goes_at_s - now_s - STOP_MARGIN_S))


class NodeWatch:
    """Asks every now and then, and tells who leaves.

    Args:
        ask: in a thread; one question at a time, however long it takes.
        on_draining: told of every answer that names a node.
    """

    def __init__(
        self,
        ask: AskDrainingNodes,
        interval_s: float,
        on_draining: Callable[[Mapping[str, float | None]], None],
    ) -> None:
        self._ask = ask
        self._interval_s = interval_s
        self._on_draining = on_draining
        self._known: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                # No timeout: a thread cannot be ended, and a second one would hang beside it. Ray
                # gives up by itself, and engines of a node that is gone are lost in any case.
                draining = await asyncio.to_thread(self._ask)
            except SlipstreamError as exc:
                LOGGER.warning("which nodes are about to go is not known: %s", exc.message)
                continue
            for node_id in draining.keys() - self._known:
                LOGGER.warning("Ray is about to lose node %s", node_id)
            self._known = frozenset(draining)
            if draining:
                self._on_draining(draining)
