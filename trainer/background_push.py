"""A push that runs beside the loop, so that work which only reads the weights need not wait.

::

    optimizer step ─► RUNNING ─► COMMITTED ─► rollouts under the new version, next optimizer step
                         └─────► FAILED

While it is RUNNING nobody may change the weights or ask for samples of the new version. The block
ends only when the push has, however it ends, so no thread reads weights that change, and no segment
is left by a push that nobody waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from types import TracebackType
from typing import Self

from trainer.publish import PushReport

LOGGER = logging.getLogger(__name__)


class PushState(StrEnum):
    """Where a push is."""

    RUNNING = "running"
    COMMITTED = "committed"
    FAILED = "failed"


class BackgroundPush:
    """``with BackgroundPush(publish) as push: ...; report = push.wait()``."""

    def __init__(self, publish: Callable[[], PushReport]) -> None:
        """
        Args:
            publish: ends by itself: each of its waits has a timeout (``trainer.api_timeout_s``).
        """
        self._pool = ThreadPoolExecutor(1, "weight-push")
        self._future: Future[PushReport] = self._pool.submit(publish)
        self._is_awaited = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if not self._is_awaited:
            # The block failed first and its error is raised; this one would be lost.
            LOGGER.warning(
                "a push beside it ended as %s: %s", self.state.value, self._future.exception()
            )

    @property
    def state(self) -> PushState:
        """Where it is now."""
        if not self._future.done():
            return PushState.RUNNING
        return PushState.COMMITTED if self._future.exception() is None else PushState.FAILED

    def wait(self) -> PushReport:
        """The report of the committed push.

        Raises:
            SlipstreamError: what ``publish`` raised.
        """
        self._is_awaited = True
        return self._future.result()
