"""Scores finished samples in worker processes: first come, first served, one job per worker.

Called by the API. Each worker sits in a ``WorkerSeat`` that replaces it when it is late or dead,
and an owner task (``_serve``) hands jobs to the seat. Whatever happens to a worker, every job gets
a result.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rollout_server.scoring.registry import BUILTIN_REWARDS
from rollout_server.scoring.signature import (
    RewardParamError,
    RewardSignature,
    read_signature,
)
from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.scoring.worker_seat import WorkerSeat
from shared.clock import Clock, SystemClock
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError, InvalidRequestError, ScoringError
from shared.schemas.rollouts import RewardSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class _QueuedJob:
    job: ScoreJob
    result: asyncio.Future[RewardResult]


class ScoringPool:
    """``scoring.num_workers`` persistent worker processes and the queue in front of them.

    The queue is unbounded: ``server.limits.max_pending_samples`` bounds what can be in it.
    """

    def __init__(self, config: ScoringConfig, clock: Clock | None = None) -> None:
        clash = sorted(set(config.rewards) & set(BUILTIN_REWARDS))
        if clash:
            raise ConfigurationError(
                f"scoring.rewards.{clash[0]}: a built-in reward has that name",
                param=f"scoring.rewards.{clash[0]}",
            )
        self._config = config
        self._clock = clock or SystemClock()
        self._queue: asyncio.Queue[_QueuedJob] = asyncio.Queue()
        self._seats: list[WorkerSeat] = []
        self._owners: list[asyncio.Task[None]] = []
        self._signatures: dict[str, RewardSignature] = {
            name: read_signature(reward.function) for name, reward in BUILTIN_REWARDS.items()
        }
        self._is_open = False

    async def start(self) -> None:
        """Start the workers; return when all of them are ready.

        Raises:
            ConfigurationError: a user reward cannot be imported.
            ScoringError: the workers do not start.
        """
        seats = [WorkerSeat(self._config, self._clock) for _ in range(self._config.num_workers)]
        try:
            # Each start ends by itself, within its own time limit, and cleans up after itself.
            outcomes = await asyncio.gather(
                *(seat.start() for seat in seats), return_exceptions=True
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
                self._signatures.update(outcome)
        except BaseException:
            await asyncio.gather(*(seat.close() for seat in seats))
            raise
        self._is_open = True
        self._seats = seats
        self._owners = [
            asyncio.create_task(self._serve(seat), name=f"scoring-worker-{index}")
            for index, seat in enumerate(seats)
        ]

    async def close(self) -> None:
        """End the workers; jobs without a result raise ``ScoringError``. May be called again."""
        self._is_open = False
        owners, self._owners = self._owners, []
        for owner in owners:
            owner.cancel()
        await asyncio.gather(*owners, return_exceptions=True)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), _closed())

    @property
    def num_queued(self) -> int:
        """Samples that wait for a worker."""
        return self._queue.qsize()

    @property
    def num_worker_restarts(self) -> int:
        """Workers replaced because they were late or had crashed."""
        return sum(seat.num_restarts for seat in self._seats)

    def reward_names(self) -> list[str]:
        """Names a request may use."""
        return sorted(set(self._signatures) | set(self._config.rewards))

    def validate_reward(self, spec: RewardSpec) -> None:
        """Check name and parameters before anything is generated.

        Raises:
            InvalidRequestError: unknown reward, or a parameter that is unknown, missing, of the
                wrong type or out of range.
        """
        signature = self._signatures.get(spec.name)
        if signature is None:
            raise InvalidRequestError(
                f"reward {spec.name!r} is not known (known: {', '.join(self.reward_names())}); "
                "rewards of your own go into scoring.rewards",
                param="reward.name",
            )
        builtin = BUILTIN_REWARDS.get(spec.name)
        try:
            signature.check(spec.params)
            if builtin is not None and builtin.check_params is not None:
                builtin.check_params(spec.params)
        except RewardParamError as exc:
            raise InvalidRequestError(
                f"reward {spec.name!r}: {exc}", param=f"reward.params.{exc.name}"
            ) from exc

    async def score(self, job: ScoreJob) -> RewardResult:
        """Judge one sample. A reward that fails, hangs or crashes is a status, not an exception.

        The wait has no limit of its own: each job before this one takes ``scoring.timeout_s`` at
        the longest.

        Raises:
            ScoringError: the pool is closed, or cannot start a worker any more.
        """
        if not self._is_open:
            raise _closed()
        queued = _QueuedJob(job=job, result=asyncio.get_running_loop().create_future())
        self._queue.put_nowait(queued)
        return await queued.result

    async def _serve(self, seat: WorkerSeat) -> None:
        """Hand jobs to one seat until the pool closes."""
        try:
            while True:
                queued = await self._queue.get()
                if queued.result.done():  # its caller gave up
                    continue
                try:
                    result = await seat.run(queued.job)
                except ScoringError as exc:
                    _fail(queued, exc)
                    continue
                except BaseException:
                    _fail(queued, _closed())
                    raise
                if not queued.result.done():
                    queued.result.set_result(result)
                await seat.refill()
        finally:
            await seat.close()


def _fail(queued: _QueuedJob, error: ScoringError) -> None:
    if not queued.result.done():
        queued.result.set_exception(error)


def _closed() -> ScoringError:
    return ScoringError("the scoring pool is not running: it was not started, or is closed")
