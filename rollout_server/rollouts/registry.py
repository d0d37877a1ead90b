"""Which rollout requests exist: the running ones, and the ended ones that are still kept.

The request id is an idempotency key: the same body under the same id attaches to the one execution
(or gets its result again), another body is a conflict. A failed request goes on with the groups
that are missing. With a ledger all this outlives the process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rollout_server.collaborators import Tokenizer
from rollout_server.engine.protocol import ModelInfo
from rollout_server.rollouts.deadline import ABORT_REPEAT_S
from rollout_server.rollouts.durable_requests import (
    body_of,
    body_to_record,
    digest_of,
    generated_request_id,
    missing,
)
from rollout_server.rollouts.execution import RolloutExecution
from rollout_server.rollouts.group_run import ExecutionParts
from rollout_server.rollouts.kept_groups import KeptGroups
from rollout_server.rollouts.ledger_records import AbortAsked, Accepted, Ended
from rollout_server.rollouts.prompts import prepare_prompts
from rollout_server.rollouts.result_store import ResultStore
from shared.errors import ConflictError, UnavailableError, UnknownResourceError
from shared.schemas.rollouts import RolloutRequest
from shared.types import RolloutRunState

LOGGER = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 30.0


class RolloutRegistry:
    """Submit, find and abort rollout requests by id."""

    def __init__(
        self,
        *,
        parts: ExecutionParts,
        tokenizer: Tokenizer,
        model: ModelInfo,
        store: ResultStore,
    ) -> None:
        self._parts = parts
        self._tokenizer = tokenizer
        self._model = model
        self._store = store
        self._running: dict[str, RolloutExecution] = {}
        self._accepting: dict[str, asyncio.Task[None]] = {}
        """Of the running ones, those that wait for the ledger."""
        self._abandoned: set[asyncio.Task[None]] = set()
        self._closing = False

    async def submit(self, request: RolloutRequest) -> RolloutExecution:
        """Start a request, or attach to the one with the same id and body.

        Returns once the ledger has it.

        Raises:
            InvalidRequestError: a prompt or the reward is wrong.
            ConflictError: the id belongs to another body.
            OverloadedError: too many pending samples.
            UnavailableError: the server is shutting down, or the ledger cannot be written.
        """
        request_id = request.request_id or generated_request_id()
        body = body_of(request)
        digest = digest_of(body)
        existing = self._reusable(request_id, digest)
        if existing is not None:
            return await self._accepted(existing)
        # Before anything is tokenized: a server with too much to do refuses cheaply.
        accounts = self._parts.router.accounts
        accounts.check_room(len(request.prompts) * request.n)
        if request.reward is not None:
            self._parts.scorer.validate_reward(request.reward)
        prompts = await asyncio.to_thread(
            prepare_prompts,
            request.prompts,
            self._tokenizer,
            self._model,
            request.sampling.max_tokens,
        )
        # From here to where it is running there is no await: two posts of one id cannot both start.
        existing = self._reusable(request_id, digest)
        if existing is not None:
            return await self._accepted(existing)
        if self._closing:
            raise UnavailableError("the server is shutting down")
        failed = self._store.get(request_id)
        groups = KeptGroups(len(prompts), () if failed is None else failed.kept)
        left = missing(prompts, groups)
        num_samples = len(left) * request.n
        accounts.reserve(num_samples)
        execution = RolloutExecution(
            request_id=request_id,
            digest=digest,
            request=request,
            prompts=left,
            groups=groups,
            parts=self._parts,
        )
        self._running[request_id] = execution
        self._store.remove(request_id)  # and not from the ledger
        change = Accepted(
            request_id=request_id,
            digest=digest,
            body=body_to_record(body, request.request_id),
            num_groups=len(prompts),
            num_samples=num_samples,
            at_s=time.time(),
        )
        if not self._parts.ledger.is_kept:
            self._begin(execution, num_samples)
            return execution
        accepting = asyncio.create_task(self._record_and_begin(execution, change, failed))
        accepting.add_done_callback(_noted)
        self._accepting[request_id] = accepting
        return await self._accepted(execution)

    def resume(self, execution: RolloutExecution) -> None:
        """Let a request of an earlier process run on; its samples are in the books."""
        self._running[execution.request_id] = execution
        execution.start(self._ended)

    def keep(self, execution: RolloutExecution) -> None:
        """Let a request that ended in an earlier process be fetched for as long as any other."""
        self._store.put(execution)

    def find(self, request_id: str) -> RolloutExecution:
        """The execution with this id, running or kept.

        Raises:
            UnknownResourceError: never seen, or no longer kept.
            UnavailableError: not here any more, because the server is shutting down.
        """
        execution = self._lookup(request_id)
        if execution is None and self._closing:
            raise UnavailableError("the server is shutting down")
        if execution is None:
            raise UnknownResourceError(
                f"no rollout request {request_id!r}: it never existed, or its result is older than "
                "server.result_ttl_s or was pushed out by server.result_store_mib",
                param="request_id",
            )
        return execution

    async def abort(self, request_id: str) -> RolloutExecution:
        """End a running request and wait until it has ended, up to ``ABORT_TIMEOUT_S``.

        Raises:
            UnknownResourceError: as ``find``.
        """
        execution = await self._accepted(self.find(request_id))
        await self._abort(execution)
        return execution

    @contextmanager
    def attended(self, execution: RolloutExecution) -> Iterator[None]:
        """While a client waits for ``execution``. One that nobody can ask for again is aborted when
        its last client leaves before it has ended."""
        execution.num_clients += 1
        try:
            yield
        finally:
            execution.num_clients -= 1
            if execution.is_abandoned:
                LOGGER.info("rollout %s: its client went away", execution.request_id)
                task = asyncio.create_task(
                    self._abort(execution), name=f"abandoned {execution.request_id}"
                )
                self._abandoned.add(task)
                task.add_done_callback(self._abandoned.discard)

    async def _abort(self, execution: RolloutExecution) -> None:
        if execution.state is RolloutRunState.RUNNING:
            # First, so that a server that is killed now does not take it up again. If it cannot be
            # written, the request is ended all the same.
            asked = AbortAsked(request_id=execution.request_id)
            await asyncio.wait({self._parts.ledger.write(asked)})
        deadline_s = monotonic() + ABORT_TIMEOUT_S
        while execution.state is RolloutRunState.RUNNING and monotonic() < deadline_s:
            # Repeated: a group may be on its way to an engine and not there yet.
            await execution.abort()
            await execution.wait(timeout_s=ABORT_REPEAT_S)

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    def sweep(self) -> None:
        """Forget results that are too old."""
        self._store.sweep()

    async def close(self, timeout_s: float) -> None:
        """Accept nothing new and end what runs: for the next process, if there is a ledger.

        Without one, abort it, and cut off what has not ended in time.
        """
        self._closing = True
        await asyncio.gather(*self._accepting.values(), return_exceptions=True)
        running = list(self._running.values())
        if not self._parts.ledger.is_kept:
            await asyncio.gather(*(execution.abort() for execution in running))
            deadline_s = monotonic() + timeout_s
            for execution in running:
                await execution.wait(timeout_s=max(0.0, deadline_s - monotonic()))
        for execution in running:
            await execution.cancel()

    async def _accepted(self, execution: RolloutExecution) -> RolloutExecution:
        accepting = self._accepting.get(execution.request_id)
        if accepting is not None:
            # Shielded: a client that leaves takes its request with it no more than later on.
            await asyncio.shield(accepting)
        return execution

    async def _record_and_begin(
        self, execution: RolloutExecution, change: Accepted, failed: RolloutExecution | None
    ) -> None:
        try:
            await self._parts.ledger.accept(change)
        except BaseException:  # a cancellation, too: its room is free again, then passed on
            self._parts.router.accounts.release(change.num_samples)
            del self._running[execution.request_id]
            if failed is not None:
                self._store.put(failed)
            raise
        finally:
            del self._accepting[execution.request_id]
        self._begin(execution, change.num_samples)

    def _begin(self, execution: RolloutExecution, num_samples: int) -> None:
        self._parts.router.accounts.admit(num_samples)
        execution.start(self._ended)

    def _lookup(self, request_id: str) -> RolloutExecution | None:
        return self._running.get(request_id) or self._store.get(request_id)

    def _reusable(self, request_id: str, digest: bytes) -> RolloutExecution | None:
        execution = self._lookup(request_id)
        if execution is None:
            return None
        if execution.digest != digest:
            raise ConflictError(
                f"request_id {request_id!r} is {execution.state.value} with another body; "
                "use a new request_id",
                param="request_id",
            )
        return None if execution.state is RolloutRunState.FAILED else execution

    def _ended(self, execution: RolloutExecution, ending: Ended | None) -> None:
        del self._running[execution.request_id]
        if ending is None:
            return  # the ledger has it as running: the next process goes on with it
        # Not waited for: without it, what has every group is found to be finished.
        self._parts.ledger.write(ending)
        self._store.put(execution)


def _noted(accepting: asyncio.Task[None]) -> None:
    """Nobody may be left to hear of a refusal; asyncio would complain of it."""
    if not accepting.cancelled():
        accepting.exception()
