"""The speculation policy in force: checks live changes, applies them to every engine, reports."""

from __future__ import annotations

import asyncio
import logging

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.speculation.policy import apply_patch, initial_policy
from shared.config.speculation import SpeculationConfig
from shared.errors import EngineDeadError, EngineError, InvalidRequestError
from shared.schemas.speculation import (
    EngineSpeculation,
    SpeculationPatch,
    SpeculationPolicy,
    SpeculationResponse,
)
from shared.types import EngineState, SpeculationMode

LOGGER = logging.getLogger(__name__)

UNREACHABLE_STATES = frozenset({EngineState.STARTING, EngineState.DEAD})
"""Engines that cannot be asked: joiners get the policy from the pool when they start."""


def patched_policy(
    policy: SpeculationPolicy, patch: SpeculationPatch, max_num_speculative_tokens: int
) -> SpeculationPolicy:
    """``policy`` with the fields of ``patch`` that are set.

    Args:
        max_num_speculative_tokens: what the engines reserved KV slots for; 0 without a drafter.

    Raises:
        InvalidRequestError: the result is impossible; names field, value and limit.
    """
    new = apply_patch(policy, patch)
    if max_num_speculative_tokens == 0:
        if new.mode is not SpeculationMode.OFF:
            raise InvalidRequestError(
                f"mode {new.mode.value} needs a drafter and the engines have none "
                "(drafter.enabled false); only off is possible",
                param="mode",
            )
    elif new.num_speculative_tokens > max_num_speculative_tokens:
        raise InvalidRequestError(
            f"num_speculative_tokens {new.num_speculative_tokens} is above the limit of "
            f"{max_num_speculative_tokens} (speculation.max_num_speculative_tokens at start)",
            param="num_speculative_tokens",
        )
    if new.kv_cache_hysteresis > new.kv_cache_threshold:
        at_fault = "kv_cache_threshold" if patch.kv_cache_hysteresis is None else None
        raise InvalidRequestError(
            f"kv_cache_hysteresis {new.kv_cache_hysteresis:g} is above kv_cache_threshold "
            f"{new.kv_cache_threshold:g}: the gate could never open again",
            param=at_fault or "kv_cache_hysteresis",
        )
    return new


class LiveSpeculation:
    """Owns the policy; engines follow it."""

    def __init__(self, pool: EnginePool, config: SpeculationConfig) -> None:
        self._pool = pool
        self._policy = initial_policy(config)
        # Two patches at once must not reach engines in different orders.
        self._lock = asyncio.Lock()
        self._joined: set[str] = set()
        """Engines that may still be STARTING and yet have had the policy: patches reach them."""

    @property
    def policy(self) -> SpeculationPolicy:
        """What holds now, for every engine and every joiner."""
        return self._policy

    async def patch(self, patch: SpeculationPatch) -> None:
        """Change the policy on every engine.

        An engine that dies meanwhile is skipped: its replacement starts with the new policy.

        Raises:
            InvalidRequestError: before any engine is touched.
            EngineError: an engine that lives did not take it.
        """
        # Bounded: whoever holds the lock waits for engine calls, which have timeouts.
        async with self._lock:
            policy = patched_policy(self._policy, patch, self._pool.max_num_speculative_tokens)
            self._policy = policy
            engines = {engine.engine_id: engine for engine in self._reachable()}
            engines |= {
                engine.engine_id: engine
                for engine in self._pool.engines()
                if engine.engine_id in self._joined
            }
            whole = self._whole_policy()
            await asyncio.gather(*(self._apply(engine, whole) for engine in engines.values()))

    async def apply_to(self, engine: EngineHandle) -> None:
        """Give a joining engine the policy in force; called before it serves.

        Raises:
            EngineError: the engine did not take it; it must not serve.
        """
        async with self._lock:  # bounded as in patch()
            await engine.set_speculation(self._whole_policy())
            self._joined &= {known.engine_id for known in self._pool.engines()}
            self._joined.add(engine.engine_id)

    def _whole_policy(self) -> SpeculationPatch:
        """Every field, so that an engine that missed an earlier change is right again."""
        return SpeculationPatch.model_validate(self._policy.model_dump())

    async def read(self, *, since_step: int = 0, history: int | None = None) -> SpeculationResponse:
        """The policy and what every reachable engine does because of it.

        Args:
            since_step: engines report decisions after this step.
            history: at most this many of the latest decisions per engine.
        """
        reports = await asyncio.gather(
            *(self._report(engine, since_step) for engine in self._reachable())
        )
        engines = [report for report in reports if report is not None]
        if history is not None:
            engines = [
                report.model_copy(update={"history": report.history[-history:] if history else []})
                for report in engines
            ]
        return SpeculationResponse(
            policy=self._policy,
            max_num_speculative_tokens=self._pool.max_num_speculative_tokens,
            engines=engines,
        )

    def _reachable(self) -> list[EngineHandle]:
        return [engine for engine in self._pool.engines() if engine.state not in UNREACHABLE_STATES]

    async def _apply(self, engine: EngineHandle, patch: SpeculationPatch) -> None:
        try:
            await engine.set_speculation(patch)
        except EngineDeadError as exc:
            LOGGER.warning("engine %s missed a speculation change: %s", engine.engine_id, exc)

    async def _report(self, engine: EngineHandle, since_step: int) -> EngineSpeculation | None:
        try:
            return await engine.speculation(since_step)
        except EngineError as exc:
            # A report about the others is worth more than none; /v1/engines shows this one.
            LOGGER.warning("engine %s gave no speculation report: %s", engine.engine_id, exc)
            return None
