"""What is wanted of one pool of engines, and what became of those it had."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rollout_server.engine.facts import EngineFacts
from rollout_server.engine.pool_plan import LIVE_STATES, Member, Wish
from rollout_server.engine.restarts import RestartLimits, Restarts
from rollout_server.speculation.calibration import SelfCalibration
from shared.config.engine import EngineConfig
from shared.config.pools import PoolConfig
from shared.errors import InvalidRequestError
from shared.pool_types import RestartState
from shared.schemas.engines import EnginePoolStatus
from shared.types import EngineState

logger = logging.getLogger(__name__)


class PoolRecord:
    """One pool.

    Args:
        config: its settings.
        engine: those of its engines.
    """

    def __init__(self, config: PoolConfig, engine: EngineConfig) -> None:
        self.name = config.name
        self.engine = engine
        self.max_count = config.max_count
        self.target_count = config.count
        self.restarts = Restarts(RestartLimits.of(engine))
        self._num_losses = 0
        self._calibrations: dict[str, SelfCalibration] = {}

    @property
    def calibrations(self) -> tuple[SelfCalibration, ...]:
        """What its engines have measured, for those that start next."""
        return tuple(self._calibrations.values())

    def started(self, facts: EngineFacts) -> None:
        """An engine of it serves."""
        self.restarts.served()
        if (measured := facts.self_calibration) is not None:
            self._calibrations.setdefault(measured.key.hash, measured)

    def ask_for(self, count: int) -> None:
        """Change the target.

        Raises:
            InvalidRequestError: above the pool's ``max_count``.
        """
        if count > self.max_count:
            raise InvalidRequestError(
                f"count {count} is above engine.max_count {self.max_count} (pool {self.name})",
                param="count",
            )
        if count != self.target_count:
            logger.info("pool %s: from %d to %d engines", self.name, self.target_count, count)
        self.target_count = count

    def clear(self) -> None:
        """An operator asks for engines: a quarantine or a backoff ends."""
        if self.restarts.last_reason is not None:
            logger.info("pool %s: its losses are forgiven", self.name)
        self.restarts.clear()

    def lost(self, engine_id: str, reason: str, now_s: float) -> None:
        """An engine that is to be replaced is gone."""
        before = self.restarts.state(now_s)
        self._num_losses += 1
        self.restarts.lost(now_s, reason, self.target_count)
        state = self.restarts.state(now_s)
        if state is RestartState.QUARANTINED and before is not state:
            logger.error(
                "pool %s is quarantined: it lost %d engines within engine.restart_window_s %g, its "
                "budget is %d (engine.restart_budget). No engine is replaced until a count is "
                "asked for again (PUT /v1/engines, slipstream engines scale). The last was %s: %s",
                self.name,
                self.restarts.num_in_window(now_s),
                self.engine.restart_window_s,
                self.restarts.budget(self.target_count),
                engine_id,
                reason,
            )
        else:
            logger.warning("engine %s is dead: %s", engine_id, reason)

    def wish(self, now_s: float) -> Wish:
        """For the plan."""
        may_start = self.restarts.state(now_s) is RestartState.READY
        return Wish(pool=self.name, target_count=self.target_count, may_start=may_start)

    def status(self, members: Sequence[Member], now_s: float) -> EnginePoolStatus:
        """The wire record.

        Args:
            members: engines of all pools.
        """
        own = [member for member in members if member.pool == self.name]
        return EnginePoolStatus(
            name=self.name,
            target_count=self.target_count,
            max_count=self.max_count,
            num_engines=sum(member.state in LIVE_STATES for member in own),
            num_serving=sum(member.state is EngineState.SERVING for member in own),
            restart_state=self.restarts.state(now_s),
            restart_in_s=self.restarts.wait_s(now_s),
            num_losses=self._num_losses,
            num_losses_in_window=self.restarts.num_in_window(now_s),
            loss_budget=self.restarts.budget(self.target_count),
            last_loss=self.restarts.last_reason,
        )
