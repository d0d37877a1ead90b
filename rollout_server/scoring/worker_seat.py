"""One place in the scoring pool: a worker process, and its replacement when that one is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from rollout_server.scoring.confinement import WorkerLimits
from rollout_server.scoring.frames import encode_frame
from rollout_server.scoring.signature import RewardSignature
from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.scoring.worker_process import WorkerCrashError, WorkerProcess
from shared.clock import Clock
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError, ScoringError
from shared.schemas.base import JsonObject
from shared.types import NetworkAccess, RewardStatus

logger = logging.getLogger(__name__)


class WorkerSeat:
    """Runs one job at a time. Owned by one task of the pool."""

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

    async def run(self, job: ScoreJob) -> RewardResult:
        """Judge a sample; time starts when a worker has it.

        Raises:
            ScoringError: there is no worker and none can be started.
        """
        worker = await self._usable_worker()
        started_s = self._clock.monotonic_s()
        reward: float | None = None
        detail: JsonObject
        try:
            frame = encode_frame(_message(job))
            async with asyncio.timeout(self._timeout_s):
                answer = await worker.ask(frame)
        except ValueError as exc:
            status, detail = RewardStatus.ERROR, {"error": f"the sample has no JSON form: {exc}"}
        except TimeoutError:
            await worker.kill()
            error = f"no result within scoring.timeout_s {self._timeout_s:g}"
            status, detail = RewardStatus.TIMEOUT, {"error": error}
        except WorkerCrashError as exc:
            await worker.kill()
            status, detail = RewardStatus.ERROR, {"error": str(exc)}
        except BaseException:
            await worker.kill()  # it owes an answer that nobody would read
            raise
        else:
            if "error" in answer:
                status, detail = RewardStatus.ERROR, {"error": answer["error"]}
            else:
                status, detail, reward = RewardStatus.OK, answer["detail"], answer["reward"]
        return RewardResult(
            reward=reward,
            status=status,
            detail=detail,
            duration_s=self._clock.monotonic_s() - started_s,
        )

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


def _message(job: ScoreJob) -> dict[str, object]:
    return {
        "name": job.reward.name,
        "params": job.reward.params,
        "prompt": job.prompt,
        "completion": job.completion,
        "answer": job.answer,
        "metadata": job.metadata,
    }
