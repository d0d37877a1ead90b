"""Whether an engine makes progress, from what it answered and when. Pure; time is passed in.

Example, with ``progress_timeout_s`` 120 and ``max_status_timeouts`` 3::

    holds work, tokens rose at the last answer                  -> healthy
    holds work, no token and no KV block more for 30 s or more  -> slow
    the same for 120 s                                          -> sick: no progress
    one or two answers in a row too late                        -> slow
    three                                                       -> sick: no status
    holds no work, or is paused or in a commit                  -> healthy, its clock starts anew
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.config.engine import EngineConfig
from shared.pool_types import EngineHealth, Sickness
from shared.schemas.engines import EngineStatus
from shared.types import EngineState

EXPECTED_TO_PROGRESS = frozenset({EngineState.SERVING, EngineState.DRAINING})
"""In other states an engine stands still because it was told to, or has not begun."""
SLOW_SHARE = 0.25
"""Of ``engine.progress_timeout_s``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthLimits:
    """Settings of ``engine``."""

    progress_timeout_s: float
    max_status_timeouts: int
    status_timeout_s: float
    """For messages; the poller keeps it."""

    @classmethod
    def of(cls, engine: EngineConfig) -> HealthLimits:
        """From the configuration."""
        return cls(
            progress_timeout_s=engine.progress_timeout_s,
            max_status_timeouts=engine.max_status_timeouts,
            status_timeout_s=engine.status_timeout_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Poll:
    """One answer of an engine."""

    time_s: float
    state: EngineState
    num_requests: int
    """Running and waiting in the engine."""
    num_tokens: int
    """Generated since it started."""
    kv_cache_usage: float
    """Rises while a long prompt is computed, before its first token."""

    @classmethod
    def of(cls, time_s: float, status: EngineStatus, state: EngineState) -> Poll:
        """From the wire record.

        Args:
            state: as the handle has it now.
        """
        return cls(
            time_s=time_s,
            state=state,
            num_requests=status.num_running_reqs + status.num_waiting_reqs,
            num_tokens=status.num_generation_tokens,
            kv_cache_usage=status.kv_cache_usage,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """What is remembered of one engine's answers."""

    last_poll: Poll
    last_progress_s: float
    """When it last made a token, or began to be expected to."""
    num_timeouts: int = 0
    """In a row, up to now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``sickness`` and ``reason`` are set exactly when the engine is sick."""

    health: EngineHealth
    sickness: Sickness | None = None
    reason: str = ""


HEALTHY = Verdict(health=EngineHealth.HEALTHY)
SLOW = Verdict(health=EngineHealth.SLOW)


def after_answer(vitals: Vitals | None, poll: Poll) -> Vitals:
    """The engine answered in time."""
    if vitals is None or _progressed(vitals.last_poll, poll) or not _is_expected(vitals, poll):
        return Vitals(last_poll=poll, last_progress_s=poll.time_s)
    return Vitals(last_poll=poll, last_progress_s=vitals.last_progress_s)


def after_timeout(vitals: Vitals | None, time_s: float, state: EngineState) -> Vitals:
    """It did not. What does not progress because it was told to may be too busy to answer."""
    if vitals is None:
        nothing = Poll(time_s=time_s, state=state, num_requests=0, num_tokens=0, kv_cache_usage=0.0)
        vitals = Vitals(last_poll=nothing, last_progress_s=time_s)
    if state not in EXPECTED_TO_PROGRESS:
        # So that its clock starts anew with the next answer.
        return replace(vitals, last_poll=replace(vitals.last_poll, state=state), num_timeouts=0)
    return replace(vitals, num_timeouts=vitals.num_timeouts + 1)


def judge(vitals: Vitals, limits: HealthLimits) -> Verdict:
    """As of the last answer: what happened since, nobody knows yet."""
    poll = vitals.last_poll
    if vitals.num_timeouts >= limits.max_status_timeouts:
        return Verdict(
            health=EngineHealth.SICK,
            sickness=Sickness.NO_STATUS,
            reason=(
                f"it did not answer within {limits.status_timeout_s:g} s "
                f"(engine.status_timeout_s) {vitals.num_timeouts} times in a row "
                "(engine.max_status_timeouts)"
            ),
        )
    if vitals.num_timeouts:
        return SLOW
    if poll.state not in EXPECTED_TO_PROGRESS or poll.num_requests == 0:
        return HEALTHY
    stood_still_s = poll.time_s - vitals.last_progress_s
    if stood_still_s >= limits.progress_timeout_s:
        return Verdict(
            health=EngineHealth.SICK,
            sickness=Sickness.NO_PROGRESS,
            reason=(
                f"it holds {poll.num_requests} requests and made no token for "
                f"{stood_still_s:.1f} s (engine.progress_timeout_s {limits.progress_timeout_s:g})"
            ),
        )
    return SLOW if stood_still_s >= SLOW_SHARE * limits.progress_timeout_s else HEALTHY


def _progressed(before: Poll, now: Poll) -> bool:
    return now.num_tokens > before.num_tokens or now.kv_cache_usage > before.kv_cache_usage


def _is_expected(vitals: Vitals, poll: Poll) -> bool:
    """Whether it held work and was to work on it all the time since the last answer."""
    return all(
        one.state in EXPECTED_TO_PROGRESS and one.num_requests > 0
        for one in (vitals.last_poll, poll)
    )
