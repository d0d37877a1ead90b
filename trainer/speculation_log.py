"""Follows ``GET /v1/speculation`` in a thread, so that every engine's decisions end up in a file.

Engines remember a bounded number of decisions; polling several times a second loses none of them.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shared.errors import SlipstreamError
from shared.schemas.speculation import SpeculationResponse
from trainer.recorder import RunRecorder
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25
STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftCounts:
    """Draft counters of one engine."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int


class SpeculationLog:
    """Polls while it is entered as a context manager; writes new decisions as they appear."""

    def __init__(self, client: RolloutClient, recorder: RunRecorder) -> None:
        self._client = client
        self._recorder = recorder
        self._latest_step: dict[str, int] = {}
        self._stop = threading.Event()
        self._poll_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="speculation-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=STOP_TIMEOUT_S)

    def poll(self) -> dict[str, DraftCounts]:
        """Ask once, write what is new, and return the counters per engine.

        Raises:
            SlipstreamError: the server does not answer, or not as expected.
        """
        with self._poll_lock:
            # One number for all engines: the oldest latest step, and each engine's own is cut off
            # below. An engine seen for the first time is asked for its whole history next time.
            since_step = min(self._latest_step.values(), default=0)
            response = self._client.speculation(since_step)
            self._write_new(response)
        return {
            engine.engine_id: DraftCounts(
                num_drafts=engine.num_drafts,
                num_draft_tokens=engine.num_draft_tokens,
                num_accepted_tokens=engine.num_accepted_tokens,
            )
            for engine in response.engines
        }

    def _write_new(self, response: SpeculationResponse) -> None:
        present = {engine.engine_id for engine in response.engines}
        first_time = not self._latest_step
        self._latest_step = {
            engine_id: step for engine_id, step in self._latest_step.items() if engine_id in present
        }
        for engine in response.engines:
            if engine.engine_id not in self._latest_step and not first_time:
                self._latest_step[engine.engine_id] = 0
                continue
            latest = self._latest_step.get(engine.engine_id, 0)
            fresh = [decision for decision in engine.history if decision.step > latest]
            self._recorder.decisions(engine.engine_id, fresh)
            self._latest_step[engine.engine_id] = max(
                [latest, *(decision.step for decision in fresh)]
            )

    def _run(self) -> None:
        failing = False
        while not self._stop.wait(POLL_INTERVAL_S):
            try:
                self.poll()
            except SlipstreamError as exc:
                # The log is not worth a run: say it once per outage and go on asking.
                if not failing:
                    LOGGER.warning("speculation is not being recorded: %s", exc.message)
                failing = True
            else:
                failing = False


def mean_acceptance_length(
    before: dict[str, DraftCounts], after: dict[str, DraftCounts]
) -> float | None:
    """1 + accepted / drafts between two readings (includes the bonus token); None without drafts.

    An engine that was not there before counts from zero.
    """
    num_drafts = num_accepted = 0
    zero = DraftCounts(num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0)
    for engine_id, counts in after.items():
        earlier = before.get(engine_id, zero)
        num_drafts += counts.num_drafts - earlier.num_drafts
        num_accepted += counts.num_accepted_tokens - earlier.num_accepted_tokens
    return 1.0 + num_accepted / num_drafts if num_drafts > 0 else None
