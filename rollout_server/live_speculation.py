"""The speculation policies in force: takes live changes, applies them to the engines, reports.

There is one policy for all engines, which joiners start with, and there may be engines with
settings of their own. Those last until the next change for all, which ends them whatever it
changes: after it every engine follows one policy again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.speculation.policy import initial_policy, whole_patch
from rollout_server.speculation_changes import (
    describe_change_for_all,
    describe_change_per_engine,
    patched_policy,
)
from shared.config.speculation import SpeculationConfig
from shared.errors import EngineDeadError, EngineError, UnknownResourceError
from shared.schemas.speculation import (
    EngineSpeculation,
    SpeculationPatch,
    SpeculationPolicy,
    SpeculationResponse,
)
from shared.types import EngineState

LOGGER = logging.getLogger(__name__)

UNREACHABLE_STATES = frozenset({EngineState.STARTING, EngineState.DEAD})
"""Engines that cannot be asked: joiners get the policy from the pool when they start."""


class LiveSpeculation:
    """Owns the policies; engines follow them.

    Args:
        kv_capacity_tokens: an engine's KV slots; None while they are not known.
    """

    def __init__(
        self,
        pool: EnginePool,
        config: SpeculationConfig,
        kv_capacity_tokens: Callable[[str], int | None] = lambda engine_id: None,
    ) -> None:
        self._pool = pool
        self._policy = initial_policy(config)
        self._overrides: dict[str, SpeculationPolicy] = {}
        """Of engines with settings of their own; an id is never given to a second engine."""
        self._kv_capacity_tokens = kv_capacity_tokens
        # Two patches at once must not reach engines in different orders.
        self._lock = asyncio.Lock()
        self._joined: set[str] = set()
        """Engines that may still be STARTING and yet have had the policy: patches reach them."""

    @property
    def policy(self) -> SpeculationPolicy:
        """What holds for every joiner, and every engine without settings of its own."""
        return self._policy

    def policy_of(self, engine_id: str) -> SpeculationPolicy:
        """What holds for this engine."""
        return self._overrides.get(engine_id, self._policy)

    async def patch(
        self,
        patch: SpeculationPatch,
        *,
        engine_ids: Sequence[str] | None = None,
        caller: str = "the server",
    ) -> None:
        """Change the policy of every engine, or of some.

        An engine that dies meanwhile is skipped: its replacement starts with the policy for all.

        Args:
            engine_ids: engines that get settings of their own; None: every engine and joiner, and
                whatever settings of their own engines had are ended.
            caller: who asked, for the log.

        Raises:
            UnknownResourceError: before any engine is touched: there is no such engine.
            InvalidRequestError: likewise: the policy would be impossible.
            EngineError: an engine that lives did not take it.
        """
        # Bounded: whoever holds the lock waits for engine calls, which have timeouts.
        async with self._lock:
            if engine_ids is None:
                engines = self._change_all(patch, caller)
            else:
                engines = self._change_some(patch, engine_ids, caller)
            await asyncio.gather(*(self._apply(engine) for engine in engines))

    def _change_all(self, patch: SpeculationPatch, caller: str) -> list[EngineHandle]:
        engines = self._known()
        policy = self._patched(self._policy, patch, list(engines))
        ended = {name: own for name, own in self._overrides.items() if name in engines}
        change = describe_change_for_all(self._policy, policy, ended, list(engines))
        LOGGER.info("speculation changed by %s: %s", caller, change)
        self._policy = policy
        self._overrides = {}
        return self._with_policy(engines)

    def _change_some(
        self, patch: SpeculationPatch, engine_ids: Sequence[str], caller: str
    ) -> list[EngineHandle]:
        engines = self._known()
        if unknown := [name for name in engine_ids if name not in engines]:
            raise UnknownResourceError(
                f"no engine {', '.join(unknown)}; there are: {', '.join(engines) or 'none'}",
                param="engine_ids",
            )
        chosen = {name: engines[name] for name in engine_ids}
        old = {name: self.policy_of(name) for name in chosen}
        new = {name: self._patched(policy, patch, [name]) for name, policy in old.items()}
        LOGGER.info("speculation changed by %s: %s", caller, describe_change_per_engine(old, new))
        self._overrides = {
            name: policy for name, policy in self._overrides.items() if name in engines
        } | new
        return self._with_policy(chosen)

    def _patched(
        self, policy: SpeculationPolicy, patch: SpeculationPatch, engine_ids: Sequence[str]
    ) -> SpeculationPolicy:
        capacities = {name: self._kv_capacity_tokens(name) for name in engine_ids}
        return patched_policy(
            policy,
            patch,
            self._pool.max_num_speculative_tokens,
            {name: capacity for name, capacity in capacities.items() if capacity},
        )

    def _known(self) -> dict[str, EngineHandle]:
        """Engines that are, or will be, alive."""
        return {
            engine.engine_id: engine
            for engine in self._pool.engines()
            if engine.state is not EngineState.DEAD
        }

    def _with_policy(self, engines: Mapping[str, EngineHandle]) -> list[EngineHandle]:
        """Those to be told now; the others are told when they join."""
        return [
            engine
            for name, engine in engines.items()
            if engine.state is not EngineState.STARTING or name in self._joined
        ]

    async def apply_to(self, engine: EngineHandle) -> None:
        """Give a joining engine the policy in force; called before it serves.

        Raises:
            EngineError: the engine did not take it; it must not serve.
        """
        async with self._lock:  # bounded as in patch()
            await engine.set_speculation(whole_patch(self.policy_of(engine.engine_id)))
            self._joined &= {known.engine_id for known in self._pool.engines()}
            self._joined.add(engine.engine_id)

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
            overrides={
                name: self._overrides[name] for name in self._known() if name in self._overrides
            },
            max_num_speculative_tokens=self._pool.max_num_speculative_tokens,
            engines=engines,
        )

    def _reachable(self) -> list[EngineHandle]:
        return [engine for engine in self._pool.engines() if engine.state not in UNREACHABLE_STATES]

    async def _apply(self, engine: EngineHandle) -> None:
        try:
            await engine.set_speculation(whole_patch(self.policy_of(engine.engine_id)))
        except EngineDeadError as exc:
            LOGGER.warning("engine %s missed a speculation change: %s", engine.engine_id, exc)

    async def _report(self, engine: EngineHandle, since_step: int) -> EngineSpeculation | None:
        try:
            return await engine.speculation(since_step)
        except EngineError as exc:
            # A report about the others is worth more than none; /v1/engines shows this one.
            LOGGER.warning("engine %s gave no speculation report: %s", engine.engine_id, exc)
            return None
