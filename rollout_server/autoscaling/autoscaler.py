"""Reads the load, asks the policy and changes the pool's target. Off unless configured."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from rollout_server.autoscaling.policy import AutoscalingPolicy, Load, ScalingDecision
from rollout_server.engine.protocol import EnginePool
from rollout_server.router.strategy import READY_STATES
from shared.config.engine import EngineConfig
from shared.pool_types import ScalingReason
from shared.schemas.engines import EngineStatus

LOGGER = logging.getLogger(__name__)


class Autoscaler:
    """Of one pool.

    Args:
        room_per_engine: samples the router hands to one engine at once.
        num_queued_samples: waiting in the router, for whichever pool has room first.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: EnginePool,
        *,
        room_per_engine: int,
        statuses: Callable[[], Sequence[EngineStatus]],
        num_queued_samples: Callable[[], int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        scaling = config.autoscaling
        chosen = next(
            own for own in config.all_pools if scaling.pool is None or own.name == scaling.pool
        )
        self._pool = pool
        self._pool_name = chosen.name
        self._policy = (
            AutoscalingPolicy(scaling, scaling.max_count or chosen.max_count)
            if scaling.enabled
            else None
        )
        self._room_per_engine = room_per_engine
        self._statuses = statuses
        self._num_queued_samples = num_queued_samples
        self._clock = clock
        self._num_changes: Counter[ScalingReason] = Counter()

    @property
    def num_changes(self) -> Mapping[ScalingReason, int]:
        """Of the target, by reason, since the server started."""
        return self._num_changes

    def tick(self) -> ScalingDecision | None:
        """Read, decide and do. None while it is off."""
        if self._policy is None:
            return None
        load = self._load()
        decision = self._policy.decide(load)
        if decision.count != load.target_count:
            self._num_changes[decision.reason] += 1
            LOGGER.info(
                "autoscaling pool %s from %d to %d engines (%s): %d samples queued, %d running, "
                "%d of %d engines ready, KV %.0f %%, %d requests waiting in engines",
                self._pool_name,
                load.target_count,
                decision.count,
                decision.reason.value,
                load.num_queued_samples,
                load.num_running_samples,
                load.num_ready,
                load.target_count,
                100 * load.kv_cache_usage,
                load.num_waiting_in_engines,
            )
            self._pool.adjust(decision.count, self._pool_name)
        return decision

    def _load(self) -> Load:
        target = next(own for own in self._pool.pools() if own.name == self._pool_name)
        own = [status for status in self._statuses() if status.pool == self._pool_name]
        ready = [status for status in own if status.state in READY_STATES]
        return Load(
            time_s=self._clock(),
            target_count=target.target_count,
            num_ready=len(ready),
            num_queued_samples=self._num_queued_samples(),
            num_running_samples=sum(status.num_reserved for status in own),
            room_per_engine=self._room_per_engine,
            kv_cache_usage=sum(s.kv_cache_usage for s in ready) / max(1, len(ready)),
            num_waiting_in_engines=sum(status.num_waiting_reqs for status in ready),
        )
