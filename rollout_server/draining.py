"""SIGTERM: refuse what is new, let what was accepted finish, then stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import suppress
from enum import StrEnum
from time import monotonic

from rollout_server.service import RolloutService

LOGGER = logging.getLogger(__name__)

POLL_S = 0.1
REFUSAL = (
    "the server is draining before it stops and accepts nothing new; send the request to another "
    "server, or again when this one is back"
)


class StopWish(StrEnum):
    """What signals have asked for."""

    RUN = "run"
    DRAIN = "drain"
    """Finish what was accepted, then stop."""
    STOP = "stop"
    """Now; what runs is aborted."""


STOP_TRANSITIONS: dict[StopWish, frozenset[StopWish]] = {
    StopWish.RUN: frozenset({StopWish.DRAIN, StopWish.STOP}),
    StopWish.DRAIN: frozenset({StopWish.STOP}),
    StopWish.STOP: frozenset(),
}


def after_signal(wish: StopWish, number: signal.Signals) -> StopWish:
    """SIGTERM drains, SIGINT stops, and so does any second signal."""
    if wish is StopWish.RUN and number is signal.SIGTERM:
        return StopWish.DRAIN
    return StopWish.STOP


class StopSignals:
    """Listens to SIGTERM and SIGINT from ``listen`` on."""

    def __init__(self) -> None:
        self._wish = StopWish.RUN
        self._asked = asyncio.Event()
        self._at_once = asyncio.Event()

    @property
    def wish(self) -> StopWish:
        return self._wish

    def listen(self) -> None:
        """Needs the running loop of the main thread."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.receive, number)

    def receive(self, number: signal.Signals) -> None:
        """One signal came."""
        wish = after_signal(self._wish, number)
        assert wish is self._wish or wish in STOP_TRANSITIONS[self._wish]
        self._wish = wish
        self._asked.set()
        if wish is StopWish.STOP:
            self._at_once.set()

    async def wait(self) -> None:
        """Until the server shall drain or stop. No timeout: this is what a server does."""
        await self._asked.wait()

    async def wait_at_once(self, timeout_s: float) -> None:
        """Until it shall stop at once, at most ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._at_once.wait()


async def drain(service: RolloutService, signals: StopSignals, timeout_s: float) -> None:
    """Refuse new requests from now on; wait for the accepted ones, at most ``timeout_s``."""
    accounts = service.router.accounts
    accounts.refuse(REFUSAL)
    LOGGER.info(
        "draining: %d samples are pending, waiting at most %g s (server.drain_timeout_s); "
        "another signal stops at once",
        accounts.num_pending,
        timeout_s,
    )
    deadline_s = monotonic() + timeout_s
    while accounts.num_pending and signals.wish is not StopWish.STOP and monotonic() < deadline_s:
        await signals.wait_at_once(POLL_S)
    if accounts.num_pending:
        LOGGER.warning("%d samples were not finished and are aborted", accounts.num_pending)
