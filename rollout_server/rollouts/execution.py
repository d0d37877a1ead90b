"""One rollout request being run, whoever listens: clients attach, leave and come back.

A finished group goes to the ledger before anybody sees it. So what was delivered is never generated
again under the same id, whatever happens to the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from time import monotonic

from rollout_server.rollouts.deadline import ended_after
from rollout_server.rollouts.group_run import ExecutionParts, Generate, run_group
from rollout_server.rollouts.kept_groups import KeptGroup, KeptGroups, kept_group
from rollout_server.rollouts.ledger_records import Ended, GroupFinished, RecordedError
from rollout_server.rollouts.prompts import PreparedPrompt
from rollout_server.tracing import span
from shared.errors import SlipstreamError, UnavailableError, first_error
from shared.logging import log_context
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, RolloutUsage
from shared.types import FinishReason, RolloutRunState

LOGGER = logging.getLogger(__name__)

OnEnd = Callable[["RolloutExecution", Ended | None], None]
"""Called with how it ended, or None where the end of the server has interrupted it."""


class RolloutExecution:
    """Generates and scores the groups that are missing. Their samples must have been accepted."""

    def __init__(
        self,
        *,
        request_id: str,
        digest: bytes,
        request: RolloutRequest,
        groups: KeptGroups,
        parts: ExecutionParts,
        prompts: Sequence[PreparedPrompt] = (),
        generate: Generate | None = None,
    ) -> None:
        """
        Args:
            groups: those that are there already, of an earlier attempt or an earlier process.
            prompts: of the groups that are missing.
            generate: takes the place of the router.
        """
        self.request_id = request_id
        self.digest = digest
        """Of the request's body; another body under the same id is a conflict."""
        self.state = RolloutRunState.RUNNING
        self.error: SlipstreamError | None = None
        self.kept = groups
        self.num_clients = 0
        """Whose answers wait for it (see ``RolloutRegistry.attended``)."""
        self._request = request
        self._prompts = prompts
        self._parts = parts
        self._generate = generate or parts.router.generate
        self._num_unsettled = len(prompts) * request.n
        self._num_failed = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def usage(self) -> RolloutUsage:
        """Tokens of the groups that are there."""
        return self.kept.usage

    @property
    def num_groups(self) -> int:
        """Groups there will be."""
        return self.kept.num_groups

    @property
    def outlives_clients(self) -> bool:
        """Its caller gave it a name by which to ask again."""
        return self._request.request_id is not None

    @property
    def is_abandoned(self) -> bool:
        """It runs for nobody."""
        return (
            self.state is RolloutRunState.RUNNING
            and self.num_clients == 0
            and not self.outlives_clients
        )

    @property
    def num_finished_groups(self) -> int:
        """Groups that are there."""
        return len(self.kept)

    @property
    def num_bytes(self) -> int:
        """Memory the kept groups take."""
        return self.kept.num_bytes

    def start(self, on_end: OnEnd) -> None:
        """Run in a task of its own; ``on_end`` is called once, when the state is final."""
        self._task = asyncio.create_task(self._run(on_end), name=f"rollout {self.request_id}")

    def end_without_running(self, error: SlipstreamError | None) -> None:
        """Be what ended in an earlier process."""
        self.error = error
        self.state = RolloutRunState.FINISHED if error is None else RolloutRunState.FAILED
        self._drop_prompts()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until the state is final or ``timeout_s`` has passed. Never raises the run's error.

        Without a timeout the wait is bounded by the groups themselves
        (``engine.generate_timeout_s`` and ``server.engine_wait_timeout_s``).
        """
        if self.state is not RolloutRunState.RUNNING:
            return
        assert self._task is not None, "start() comes first"
        await asyncio.wait({self._task}, timeout=timeout_s)

    async def groups(self) -> AsyncIterator[bytes]:
        """JSON of every group in order of finishing, those of the past first."""
        num_seen = 0
        while True:
            bodies = self.kept.bodies_after(num_seen)
            for body in bodies:
                yield body
            num_seen += len(bodies)
            if num_seen < len(self.kept):
                continue
            if self.state is not RolloutRunState.RUNNING:
                return
            await self._changed.wait()  # bounded as in wait()

    def ordered_groups(self) -> Iterator[bytes]:
        """JSON of every group, in the order of the prompts."""
        assert self.state is RolloutRunState.FINISHED, "only finished requests have a response"
        return self.kept.ordered_bodies()

    def response_body(self) -> bytes:
        """JSON of ``RolloutResponse``, groups in the order of the prompts."""
        head = RolloutUsage.model_dump_json(self.usage).encode()
        groups = b",".join(self.ordered_groups())
        # request_id is made of characters that need no escaping (see RolloutRequest).
        return (
            b'{"request_id":"%b","groups":[' % self.request_id.encode()
            + groups
            + b'],"usage":%b}' % head
        )

    async def abort(self) -> None:
        """Ask every unfinished group to end; they end with ``finish_reason: abort``."""
        unfinished = [
            prompt.prompt_index for prompt in self._prompts if prompt.prompt_index not in self.kept
        ]
        await asyncio.gather(
            *(self._parts.router.abort(self._group_id(index)) for index in unfinished)
        )

    async def cancel(self) -> None:
        """Stop at once (shutdown): the state becomes FAILED, and in the ledger it goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, on_end: OnEnd) -> None:
        with log_context(request_id=self.request_id):
            started_s = monotonic()
            async with ended_after(self._request.deadline_s, self.abort):
                await self._run_groups(on_end)
            LOGGER.info(
                "rollout %s %s: %d of %d groups, %d completion tokens, %.3f s",
                self.request_id,
                self.state.value,
                self.num_finished_groups,
                self.num_groups,
                self.usage.num_completion_tokens,
                monotonic() - started_s,
            )

    async def _run_groups(self, on_end: OnEnd) -> None:
        is_interrupted = False
        try:
            async with asyncio.TaskGroup() as tasks:
                for prompt in self._prompts:
                    tasks.create_task(self._run_group(prompt))
            self.state = RolloutRunState.FINISHED
        except* SlipstreamError as group:
            self._fail(first_error(group))
        except* asyncio.CancelledError:
            is_interrupted = True
            self._fail(UnavailableError("the server is shutting down"))
        except* Exception as group:  # a bug of ours must not leave clients waiting
            LOGGER.error("rollout %s failed", self.request_id, exc_info=group)
            self._fail(SlipstreamError("internal error; the server's log has the details"))
        finally:
            self._parts.router.accounts.settle(num_cancelled=self._num_unsettled)
            self._num_unsettled = 0
            self._drop_prompts()
            on_end(self, None if is_interrupted else self._ending())
            self._notify()

    def _drop_prompts(self) -> None:
        """Ended executions are kept for their groups, which hold what goes out; only those count
        towards ``server.result_store_mib``."""
        self._prompts = ()
        self._request = self._request.model_copy(update={"prompts": []})

    def _fail(self, error: SlipstreamError) -> None:
        self.error = self.error or error
        self.state = RolloutRunState.FAILED

    def _ending(self) -> Ended:
        error = self.error
        return Ended(
            request_id=self.request_id,
            num_failed=self._num_failed,
            error=None
            if error is None
            else RecordedError(code=error.code, message=error.message, param=error.param),
            at_s=time.time(),
        )

    async def _run_group(self, prompt: PreparedPrompt) -> None:
        request = self._request
        group_id = self._group_id(prompt.prompt_index)
        with (
            log_context(group_id=group_id),
            span("group", group_id=group_id, num_samples=request.n),
        ):
            started_s = monotonic()
            try:
                group = await run_group(prompt, group_id, request, self._parts, self._generate)
                kept = kept_group(group)
            except Exception:  # counted whatever it is, then passed on
                self._num_failed += request.n
                self._settle(num_failed=request.n)
                raise
            await self._deliver(group, kept, started_s)

    async def _deliver(self, group: RolloutGroup, kept: KeptGroup, started_s: float) -> None:
        num_cancelled = sum(sample.finish_reason is FinishReason.ABORT for sample in group.samples)
        num_delivered = len(group.samples) - num_cancelled
        is_cancelled = await self._is_cancelled_while_recording(
            GroupFinished(
                request_id=self.request_id,
                group=kept,
                num_delivered=num_delivered,
                num_cancelled=num_cancelled,
            )
        )
        self._settle(num_delivered=num_delivered, num_cancelled=num_cancelled)
        self.kept.add(kept)
        self._parts.on_group(group, self._request)
        duration_s = monotonic() - started_s
        self._parts.on_group_seconds(duration_s)
        versions = [part.version for sample in group.samples for part in sample.weight_versions]
        with log_context(
            engine_id=group.samples[0].engine_id, weight_version=max(versions, default=None)
        ):
            LOGGER.debug("group %s delivered in %.3f s", group.group_id, duration_s)
        self._notify()
        if is_cancelled:
            raise asyncio.CancelledError

    async def _is_cancelled_while_recording(self, change: GroupFinished) -> bool:
        """Return once the ledger has it. Or could not: it is delivered all the same then, since its
        tokens are dear, and the ledger goes on trying."""
        if not self._parts.ledger.is_kept:
            return False
        recorded = self._parts.ledger.write(change)
        try:
            await asyncio.wait({recorded})
        except asyncio.CancelledError:
            # What is on its way to the disk cannot be taken back, and counts as delivered there.
            await asyncio.wait({recorded})
            return True
        return False

    def _settle(
        self, *, num_delivered: int = 0, num_failed: int = 0, num_cancelled: int = 0
    ) -> None:
        self._num_unsettled -= num_delivered + num_failed + num_cancelled
        self._parts.router.accounts.settle(
            num_delivered=num_delivered, num_failed=num_failed, num_cancelled=num_cancelled
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _group_id(self, prompt_index: int) -> str:
        return f"{self.request_id}/group={prompt_index}"
