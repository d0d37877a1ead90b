"""How many engines the load calls for. A small state machine; time is passed in.

Three things keep it from flapping. A reason to change must last (``grow_after_s``,
``shrink_after_s``); after a change nothing happens for a while (``grow_cooldown_s``,
``shrink_cooldown_s``); and it shrinks only where one engine fewer would still be less than
``idle_share`` full, which is far from where it grows.

Example, with room for 64 samples per engine, ``queue_share`` 0.25 and ``idle_share`` 0.5::

    2 engines, 128 samples run, 40 wait for 10 s     -> 3 engines
    2 engines, 128 samples run, 300 wait for 10 s    -> 4 engines: at most twice as many
    4 engines, 90 samples run for 120 s              -> 3 engines: 90 < 0.5 * 3 * 64
    4 engines, 100 samples run                       -> 4 engines
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.config.autoscaling import AutoscalingConfig
from shared.pool_types import ScalingReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the pool has to do now."""

    time_s: float
    target_count: int
    """Engines asked for, by whomever."""
    num_ready: int
    """Of those, the ones that take requests."""
    num_queued_samples: int
    """Waiting in the router."""
    num_running_samples: int
    """Handed to engines and not had back."""
    room_per_engine: int
    """Samples the router hands to one engine at once."""
    kv_cache_usage: float
    """Mean fraction over the ready engines; 0 without any."""
    num_waiting_in_engines: int
    """Requests that engines hold and do not run, for want of KV blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingDecision:
    """The target the pool shall have; ``load.target_count`` where nothing is to change."""

    count: int
    reason: ScalingReason


class AutoscalingPolicy:
    """Of one pool.

    Args:
        max_count: of the pool, or less.
    """

    def __init__(self, config: AutoscalingConfig, max_count: int) -> None:
        self._config = config
        self._min_count = config.min_count
        self._max_count = max_count
        self._last_change_s = -math.inf
        self._grow_since_s: float | None = None
        self._shrink_since_s: float | None = None

    def decide(self, load: Load) -> ScalingDecision:
        """Call it with every reading of the load, in order; the decision must be followed."""
        bounded = min(max(load.target_count, self._min_count), self._max_count)
        if bounded != load.target_count:
            return self._change(load, bounded, ScalingReason.LIMIT)
        pressure = self._pressure(load)
        is_idle = pressure is None and self._fits_fewer(load)
        self._grow_since_s = _since(self._grow_since_s, pressure is not None, load.time_s)
        self._shrink_since_s = _since(self._shrink_since_s, is_idle, load.time_s)
        if pressure is not None and self._grow_since_s is not None:
            return self._grow(load, pressure, load.time_s - self._grow_since_s)
        if self._shrink_since_s is not None:
            return self._shrink(load, load.time_s - self._shrink_since_s)
        return _stay(load, ScalingReason.STEADY)

    def _pressure(self, load: Load) -> ScalingReason | None:
        config = self._config
        room = load.num_ready * load.room_per_engine
        if load.num_queued_samples > config.queue_share * room:
            return ScalingReason.QUEUE
        if load.num_waiting_in_engines and load.kv_cache_usage > config.kv_cache_high:
            return ScalingReason.KV_PRESSURE
        return None

    def _fits_fewer(self, load: Load) -> bool:
        """Whether one engine fewer would do, with ``idle_share`` to spare."""
        num_left = load.target_count - 1
        if load.num_queued_samples or num_left < self._min_count:
            return False
        if num_left == 0:
            return load.num_running_samples == 0
        share = self._config.idle_share
        kv_cache_usage = load.kv_cache_usage * load.num_ready / num_left
        samples = load.num_running_samples / (num_left * load.room_per_engine)
        return samples < share and kv_cache_usage < share

    def _grow(self, load: Load, reason: ScalingReason, lasted_s: float) -> ScalingDecision:
        if load.target_count >= self._max_count or lasted_s < self._config.grow_after_s:
            return _stay(load, ScalingReason.STEADY)
        if load.num_ready < load.target_count:
            return _stay(load, ScalingReason.STARTING)
        if load.time_s - self._last_change_s < self._config.grow_cooldown_s:
            return _stay(load, ScalingReason.COOLDOWN)
        num_more = max(1, load.num_queued_samples // load.room_per_engine)
        # At most twice as many: a queue may be a moment's, an engine costs a model load.
        count = load.target_count + min(num_more, max(1, load.target_count))
        return self._change(load, min(count, self._max_count), reason)

    def _shrink(self, load: Load, lasted_s: float) -> ScalingDecision:
        if lasted_s < self._config.shrink_after_s:
            return _stay(load, ScalingReason.STEADY)
        if load.time_s - self._last_change_s < self._config.shrink_cooldown_s:
            return _stay(load, ScalingReason.COOLDOWN)
        return self._change(load, load.target_count - 1, ScalingReason.IDLE)

    def _change(self, load: Load, count: int, reason: ScalingReason) -> ScalingDecision:
        self._last_change_s = load.time_s
        self._grow_since_s = self._shrink_since_s = None
        return ScalingDecision(count=count, reason=reason)


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    """Since when something holds without a break."""
    if not holds:
        return None
    return now_s if since_s is None else since_s


def _stay(load: Load, reason: ScalingReason) -> ScalingDecision:
    return ScalingDecision(count=load.target_count, reason=reason)
