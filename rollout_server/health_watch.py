"""Judges engines by what the status poller hears of them, and gives up those that are sick."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from rollout_server.engine.protocol import EngineHandle
from rollout_server.health import (
    EXPECTED_TO_PROGRESS,
    HealthLimits,
    Poll,
    Verdict,
    Vitals,
    after_answer,
    after_timeout,
    judge,
)
from shared.logging import log_context
from shared.pool_types import EngineHealth, Sickness
from shared.schemas.engines import EngineStatus
from shared.types import EngineState

LOGGER = logging.getLogger(__name__)


class HealthWatch:
    """One per server. The pool replaces what is condemned here."""

    def __init__(self, limits: HealthLimits, clock: Callable[[], float] = monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._vitals: dict[str, Vitals] = {}
        self._healths: dict[str, EngineHealth] = {}
        self._num_sick: Counter[Sickness] = Counter()

    @property
    def num_sick(self) -> Mapping[Sickness, int]:
        """Engines given up since the server started."""
        return self._num_sick

    def health(self, engine_id: str) -> EngineHealth:
        """As of its last answer, or its failure to answer."""
        return self._healths.get(engine_id, EngineHealth.HEALTHY)

    def answered(self, engine: EngineHandle, status: EngineStatus) -> None:
        """It answered in time."""
        poll = Poll.of(self._clock(), status, engine.state)
        self._judge(engine, after_answer(self._vitals.get(engine.engine_id), poll))

    def timed_out(self, engine: EngineHandle) -> None:
        """It did not answer within ``engine.status_timeout_s``."""
        vitals = self._vitals.get(engine.engine_id)
        self._judge(engine, after_timeout(vitals, self._clock(), engine.state))

    def froze(self, engine: EngineHandle, reason: str) -> None:
        """It owes an answer, and none of its processes does anything (``until_standstill``)."""
        if engine.state not in EXPECTED_TO_PROGRESS:
            return  # given up already, or in a push's pause, which watches for itself
        sick = Verdict(health=EngineHealth.SICK, sickness=Sickness.FROZEN, reason=reason)
        self._change(engine, sick)

    def forget_others(self, engines: Sequence[EngineHandle]) -> None:
        """Only these are left."""
        known = {engine.engine_id for engine in engines}
        for memory in (self._vitals, self._healths):
            for engine_id in memory.keys() - known:
                del memory[engine_id]

    def _judge(self, engine: EngineHandle, vitals: Vitals) -> None:
        if engine.state is EngineState.DEAD:
            return  # an answer too late: somebody has given it up already
        self._vitals[engine.engine_id] = vitals
        self._change(engine, judge(vitals, self._limits))

    def _change(self, engine: EngineHandle, verdict: Verdict) -> None:
        before = self.health(engine.engine_id)
        self._healths[engine.engine_id] = verdict.health
        if verdict.health is before:
            return
        with log_context(engine_id=engine.engine_id):
            self._act_on_change(engine, verdict)

    def _act_on_change(self, engine: EngineHandle, verdict: Verdict) -> None:
        if verdict.sickness is None:
            LOGGER.info("engine %s is %s", engine.engine_id, verdict.health.value)
            return
        LOGGER.error("engine %s is given up: %s", engine.engine_id, verdict.reason)
        self._num_sick[verdict.sickness] += 1
        engine.condemn(verdict.reason)
