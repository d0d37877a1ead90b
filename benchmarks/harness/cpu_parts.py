"""Where a server's CPU time goes, by part, measured on its event loop.

Functions are wrapped with a clock while a server is measured, and only then. Coroutines are timed
from step to step, so that what they wait for is not counted; a part inside another is counted once,
as the inner one. Clocks have a price of their own: figures are shares, to be held against the CPU
time of a server that is not measured.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from rollout_server.api import data_plane
from rollout_server.rollouts import execution, group_run, kept_groups, registry
from rollout_server.service import RolloutService
from shared.schemas.rollouts import RolloutGroup, RolloutRequest


class CpuParts:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since_s = 0.0

    def watch(self, service: RolloutService) -> None:
        """Wrap what a rollout passes through. For the rest of the process's life."""
        self._function(RolloutRequest, "model_validate_json", "parse and validate")
        self._function(data_plane, "check_rollout", "check limits")
        self._function(registry, "body_of", "digest")
        self._function(registry, "digest_of", "digest")
        self._thread(registry, "prepare_prompts", "tokenize")
        self._coroutine(registry.RolloutRegistry, "submit", "register")
        self._coroutine(execution.RolloutExecution, "_run", "run groups")
        self._coroutine(service.router, "generate", "route")
        for engine in service._pool.engines():
            self._coroutine(engine, "generate", "engine")
        self._coroutine(service._scoring, "score_group", "score")
        self._function(group_run, "build_group", "build answer")
        self._function(kept_groups, "usage_of", "build answer")
        self._function(RolloutGroup, "model_dump_json", "encode")
        self._function(execution.RolloutExecution, "response_body", "encode")
        self._function(service.metrics, "observe_group", "metrics")
        self._function(service.metrics, "observe_generation", "metrics")
        self._function(service.metrics, "observe_request", "metrics")
        self._function(service.dashboard, "observe_group", "dashboard")

    def _function(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            try:
                return original(*args, **kwargs)
            finally:
                self._leave()

        setattr(owner, name, timed)

    def _thread(self, owner: Any, name: str, part: str) -> None:
        """Of what runs beside the event loop."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[part] += time.thread_time() - started_s

        setattr(owner, name, timed)

    def _coroutine(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        async def timed(*args: Any, **kwargs: Any) -> Any:
            return await _Steps(self, part, original(*args, **kwargs))

        setattr(owner, name, timed)

    def _enter(self, part: str) -> None:
        self._book()
        self._open.append(part)

    def _leave(self) -> None:
        self._book()
        self._open.pop()

    def _book(self) -> None:
        now_s = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] += now_s - self._since_s
        self._since_s = now_s


class _Steps:
    """Awaits a coroutine and times each of its steps."""

    def __init__(self, parts: CpuParts, part: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._parts = parts
        self._part = part
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = self._coroutine.send
        argument: Any = None
        while True:
            self._parts._enter(self._part)
            try:
                waits_for = step(argument)
            except StopIteration as end:
                return end.value
            finally:
                self._parts._leave()
            try:
                step, argument = self._coroutine.send, (yield waits_for)
            except BaseException as exc:  # noqa: BLE001 - cancellation, for whoever is awaited
                step, argument = self._coroutine.throw, exc
