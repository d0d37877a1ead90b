"""One place in the scoring pool: a worker process, and its replacement when that one is lost."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout_server.scoring.confinement import WorkerLimits
from rollout_server.scoring.frames import encode_frame
from rollout_server.scoring.signature import RewardSignature
from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.scoring.worker_process import WorkerCrashError, WorkerProcess
from shared.clock import Clock
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError, ScoringError
from shared.types import NetworkAccess, RewardStatus

logger = logging.getLogger(__name__)


class WorkerSeat:
    """Runs one batch at a time. Owned by one task of the pool."""

    def __init__(self, config: ScoringConfig, clock: Clock) -> None:
        self._rewards: Mapping[str, str] = config.rewards
        self._timeout_s = config.timeout_s
        self._limits = WorkerLimits(
            max_cpu_s=config.max_cpu_s,
            max_memory_mib=config.max_memory_mib,
            denies_network=config.network is NetworkAccess.DENY,
        )
        self._clock = clock
        self._worker: WorkerProcess | None = None
        self.num_restarts = 0
        """Workers replaced so far."""

    async def start(self) -> dict[str, RewardSignature]:
        """Start the worker; the signatures of the user rewards.

        Raises:
            ConfigurationError: a user reward cannot be imported.
            ScoringError: the process does not come up.
        """
        self._worker, signatures = await WorkerProcess.start(self._rewards, self._limits)
        return signatures

    async def run(self, jobs: Sequence[ScoreJob], deliver: Callable[[RewardResult], None]) -> None:
        """Judge samples that share their question, in order. Each has ``scoring.timeout_s``.

        ``deliver`` gets a result for the first of them, and for as many more as the worker began
        before its slice was used up or it was lost. Samples without a result were never begun.

        Raises:
            ScoringError: there is no worker and none can be started.
        """
        worker = await self._usable_worker()
        begun_s = self._clock.monotonic_s()

        def fail(status: RewardStatus, error: str) -> None:
            duration_s = self._clock.monotonic_s() - begun_s
            deliver(_failed(status, error, duration_s))

        try:
            frame = encode_frame(_batch(jobs))
        except (TypeError, ValueError, RecursionError) as exc:
            for _ in jobs:  # text always has a form: it is what they share that has none
                fail(RewardStatus.ERROR, f"the sample has no JSON form: {exc}")
            return
        is_last = False
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                await worker.send(frame)
                while not is_last:
                    answer = await worker.receive()
                    is_last = answer["last"]
                    deliver(_judged(answer))
                    # The next sample has been begun, before we heard of this one at the latest.
                    begun_s = self._clock.monotonic_s()
                    limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
        except TimeoutError:
            await worker.kill()
            fail(RewardStatus.TIMEOUT, f"no result within scoring.timeout_s {self._timeout_s:g}")
        except WorkerCrashError as exc:
            await worker.kill()
            fail(RewardStatus.ERROR, str(exc))
        except BaseException:
            await worker.kill()  # it owes answers that nobody would read
            raise

    async def refill(self) -> None:
        """Replace a lost worker now, so that the next job does not wait for it."""
        try:
            await self._usable_worker()
        except ScoringError as exc:
            logger.error("scoring: %s; trying again with the next sample", exc)

    async def close(self) -> None:
        """End the worker. May be called again."""
        if self._worker is not None:
            await self._worker.kill()

    async def _usable_worker(self) -> WorkerProcess:
        if self._worker is None or not self._worker.is_usable:
            if self._worker is not None:
                logger.warning("scoring: replacing worker %d", self._worker.pid)
                await self._worker.kill()
                self.num_restarts += 1
            try:
                await self.start()
            except ConfigurationError as exc:  # importable at the start of the server, not any more
                raise ScoringError(exc.message) from exc
        assert self._worker is not None, "started above"
        return self._worker


def _batch(jobs: Sequence[ScoreJob]) -> dict[str, object]:
    """One frame; see ``run_batch`` for what the worker makes of it."""
    first = jobs[0]
    question = {"params": first.reward.params, "metadata": first.metadata}
    return {
        "name": first.reward.name,
        "prompt": first.prompt,
        "answer": first.answer,
        "question": json.dumps(question, allow_nan=False),
        "completions": [job.completion for job in jobs],
    }


def _judged(answer: Mapping[str, Any]) -> RewardResult:
    if "error" in answer:
        return _failed(RewardStatus.ERROR, answer["error"], answer["duration_s"])
    return RewardResult(
        reward=answer["reward"],
        status=RewardStatus.OK,
        detail=answer["detail"],
        duration_s=answer["duration_s"],
    )


def _failed(status: RewardStatus, error: str, duration_s: float) -> RewardResult:
    return RewardResult(reward=None, status=status, detail={"error": error}, duration_s=duration_s)
