"""One rollout request being run, whoever listens: clients attach, leave and come back.

Finished groups are kept as the JSON that goes out, encoded once: streams, answers and repeated
fetches join the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

from rollout_server.collaborators import Scorer
from rollout_server.engine.protocol import GenerateRequest
from rollout_server.rollouts.groups import (
    EMPTY_USAGE,
    SKIPPED,
    add_usage,
    build_group,
    score_job,
)
from rollout_server.rollouts.prompts import PreparedPrompt
from rollout_server.router.router import Router
from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.tracing import span
from shared.errors import ScoringError, SlipstreamError, UnavailableError, first_error
from shared.logging import log_context
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, RolloutUsage
from shared.types import FinishReason, RewardStatus, RolloutRunState

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionParts:
    """What every execution works with."""

    router: Router
    scorer: Scorer
    committed_version: Callable[[], int]
    on_group: Callable[[RolloutGroup, RolloutRequest], None]
    """Told of every delivered group and what asked for it (metrics, dashboard)."""
    on_group_seconds: Callable[[float], None] = lambda seconds: None
    """Told how long it took, from acceptance to its scores."""


class RolloutExecution:
    """Generates and scores all groups of one request. Its samples must have been accepted."""

    def __init__(
        self,
        *,
        request_id: str,
        digest: bytes,
        request: RolloutRequest,
        prompts: Sequence[PreparedPrompt],
        parts: ExecutionParts,
    ) -> None:
        self.request_id = request_id
        self.digest = digest
        """Of the request's body; another body under the same id is a conflict."""
        self.state = RolloutRunState.RUNNING
        self.error: SlipstreamError | None = None
        self.usage: RolloutUsage = EMPTY_USAGE
        self.num_groups = len(prompts)
        self.num_clients = 0
        """Whose answers wait for it (see ``RolloutRegistry.attended``)."""
        self._request = request
        self._prompts = prompts
        self._parts = parts
        self._num_unsettled = len(prompts) * request.n
        self._bodies: dict[int, bytes] = {}  # prompt_index -> JSON, in order of finishing
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

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
        return len(self._bodies)

    @property
    def num_bytes(self) -> int:
        """Memory the kept groups take."""
        return sum(len(body) for body in self._bodies.values())

    def start(self, on_end: Callable[[RolloutExecution], None]) -> None:
        """Run in a task of its own; ``on_end`` is called once, when the state is final."""
        self._task = asyncio.create_task(self._run(on_end), name=f"rollout {self.request_id}")

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until the state is final or ``timeout_s`` has passed. Never raises the run's error.

        Without a timeout the wait is bounded by the groups themselves
        (``engine.generate_timeout_s`` and ``server.engine_wait_timeout_s``).
        """
        assert self._task is not None, "start() comes first"
        await asyncio.wait({self._task}, timeout=timeout_s)

    async def groups(self) -> AsyncIterator[bytes]:
        """JSON of every group in order of finishing, those of the past first."""
        num_seen = 0
        while True:
            bodies = list(self._bodies.values())[num_seen:]
            for body in bodies:
                yield body
            num_seen += len(bodies)
            if num_seen < len(self._bodies):
                continue
            if self.state is not RolloutRunState.RUNNING:
                return
            await self._changed.wait()  # bounded as in wait()

    def ordered_groups(self) -> Iterator[bytes]:
        """JSON of every group, in the order of the prompts."""
        assert self.state is RolloutRunState.FINISHED, "only finished requests have a response"
        return (self._bodies[index] for index in range(self.num_groups))

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
            prompt.prompt_index
            for prompt in self._prompts
            if prompt.prompt_index not in self._bodies
        ]
        await asyncio.gather(
            *(self._parts.router.abort(self._group_id(index)) for index in unfinished)
        )

    async def cancel(self) -> None:
        """Stop at once (shutdown): the state becomes FAILED."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, on_end: Callable[[RolloutExecution], None]) -> None:
        with log_context(request_id=self.request_id):
            started_s = monotonic()
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

    async def _run_groups(self, on_end: Callable[[RolloutExecution], None]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for prompt in self._prompts:
                    tasks.create_task(self._run_group(prompt))
            self.state = RolloutRunState.FINISHED
        except* SlipstreamError as group:
            self._fail(first_error(group))
        except* asyncio.CancelledError:
            self._fail(UnavailableError("the server is shutting down"))
        except* Exception as group:  # a bug of ours must not leave clients waiting
            LOGGER.error("rollout %s failed", self.request_id, exc_info=group)
            self._fail(SlipstreamError("internal error; the server's log has the details"))
        finally:
            self._parts.router.accounts.settle(num_cancelled=self._num_unsettled)
            self._num_unsettled = 0
            self._prompts = ()  # ended executions are kept for their groups, which hold the ids
            on_end(self)
            self._notify()

    def _fail(self, error: SlipstreamError) -> None:
        self.error = self.error or error
        self.state = RolloutRunState.FAILED

    async def _run_group(self, prompt: PreparedPrompt) -> None:
        group_id = self._group_id(prompt.prompt_index)
        with (
            log_context(group_id=group_id),
            span("group", group_id=group_id, num_samples=self._request.n),
        ):
            await self._generate_and_score(prompt, group_id)

    async def _generate_and_score(self, prompt: PreparedPrompt, group_id: str) -> None:
        request = self._request
        started_s = monotonic()
        try:
            routed = await self._parts.router.generate(
                GenerateRequest(
                    request_id=group_id,
                    prompt_token_ids=prompt.token_ids,
                    n=request.n,
                    sampling=request.sampling,
                )
            )
            jobs = {
                index: job
                for index, sample in enumerate(routed.result.samples)
                if (job := score_job(prompt, sample, request.reward)) is not None
            }
            rewards = [SKIPPED] * request.n
            with span("score", num_samples=len(jobs)):
                # A task per sample is dear where nothing is scored.
                results = await asyncio.gather(*map(self._score, jobs.values())) if jobs else []
            for index, result in zip(jobs, results, strict=True):
                rewards[index] = result
            group = build_group(
                group_id=group_id,
                prompt=prompt,
                routed=routed,
                rewards=rewards,
                committed_version=self._parts.committed_version(),
                max_policy_lag=request.max_policy_lag,
            )
            body = group.model_dump_json().encode()
        except Exception:  # counted whatever it is, then passed on
            self._settle(num_failed=request.n)
            raise
        num_cancelled = sum(
            sample.finish_reason is FinishReason.ABORT for sample in routed.result.samples
        )
        self._settle(num_delivered=request.n - num_cancelled, num_cancelled=num_cancelled)
        self.usage = add_usage(self.usage, group)
        self._bodies[prompt.prompt_index] = body
        self._parts.on_group(group, request)
        duration_s = monotonic() - started_s
        self._parts.on_group_seconds(duration_s)
        spans = [s for sample in routed.result.samples for s in sample.weight_versions]
        version = max((s.version for s in spans), default=None)
        with log_context(engine_id=routed.result.engine_id, weight_version=version):
            LOGGER.debug("group %s delivered in %.3f s", group_id, duration_s)
        self._notify()

    async def _score(self, job: ScoreJob) -> RewardResult:
        try:
            return await self._parts.scorer.score(job)
        except ScoringError as exc:
            # Tokens are dear: they are delivered even when the scoring pool is broken.
            LOGGER.error("scoring for %s failed: %s", self.request_id, exc.message)
            return RewardResult(
                reward=None,
                status=RewardStatus.ERROR,
                detail={"error": exc.message},
                duration_s=0.0,
            )

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
