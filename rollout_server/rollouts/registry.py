"""Which rollout requests exist: the running ones, and the ended ones that are still kept.

The request id is an idempotency key: the same body under the same id attaches to the one execution
(or gets its result again), another body is a conflict. A failed request starts afresh.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rollout_server.collaborators import Tokenizer
from rollout_server.engine.protocol import ModelInfo
from rollout_server.rollouts.execution import ExecutionParts, RolloutExecution
from rollout_server.rollouts.prompts import prepare_prompts
from rollout_server.rollouts.result_store import ResultStore
from shared.errors import ConflictError, UnavailableError, UnknownResourceError
from shared.schemas.rollouts import RolloutRequest
from shared.types import RolloutRunState

LOGGER = logging.getLogger(__name__)

ABORT_REPEAT_S = 0.5
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
        self._abandoned: set[asyncio.Task[None]] = set()
        self._closing = False

    async def submit(self, request: RolloutRequest) -> RolloutExecution:
        """Start a request, or attach to the one with the same id and body.

        Raises:
            InvalidRequestError: a prompt or the reward is wrong.
            ConflictError: the id belongs to another body.
            OverloadedError: too many pending samples.
            UnavailableError: the server is shutting down.
        """
        request_id = request.request_id or f"rollout-{uuid.uuid4().hex}"
        digest = _digest(request)
        existing = self._reusable(request_id, digest)
        if existing is not None:
            return existing
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
        # From here to the end there is no await: two posts of one id cannot both start it.
        existing = self._reusable(request_id, digest)
        if existing is not None:
            return existing
        if self._closing:
            raise UnavailableError("the server is shutting down")
        accounts.accept(len(prompts) * request.n)
        execution = RolloutExecution(
            request_id=request_id,
            digest=digest,
            request=request,
            prompts=prompts,
            parts=self._parts,
        )
        self._running[request_id] = execution
        execution.start(self._ended)
        return execution

    def find(self, request_id: str) -> RolloutExecution:
        """The execution with this id, running or kept.

        Raises:
            UnknownResourceError: never seen, or no longer kept.
        """
        execution = self._lookup(request_id)
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
        execution = self.find(request_id)
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
        """Accept nothing new, abort what runs, and cut off what has not ended in time."""
        self._closing = True
        running = list(self._running.values())
        await asyncio.gather(*(execution.abort() for execution in running))
        deadline_s = monotonic() + timeout_s
        for execution in running:
            await execution.wait(timeout_s=max(0.0, deadline_s - monotonic()))
            await execution.cancel()

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

    def _ended(self, execution: RolloutExecution) -> None:
        del self._running[execution.request_id]
        self._store.put(execution)


def _digest(request: RolloutRequest) -> bytes:
    """How the answer is delivered (``stream``) is not part of what was asked for."""
    body = request.model_dump_json(exclude={"stream", "request_id"})
    return hashlib.blake2b(body.encode(), digest_size=16).digest()
