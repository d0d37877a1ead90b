"""Scores finished samples in worker processes: first come, first served.

Called by the API. Each worker sits in a ``WorkerSeat`` that replaces it when it is late or dead,
and an owner task (``_serve``) hands samples to the seat: of a quick reward many in one frame, of a
slow one each by itself (``RewardPace``). Answers come back one by one. Whatever happens to a worker
costs the sample it had in hand; those it had not begun go back into the queue (``WaitingSamples``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from rollout_server.scoring.pace import RewardPace
from rollout_server.scoring.registry import BUILTIN_REWARDS
from rollout_server.scoring.signature import (
    RewardParamError,
    RewardSignature,
    read_signature,
)
from rollout_server.scoring.types import RewardResult, ScoreJob, ScoreOutcome
from rollout_server.scoring.waiting import SamplesInHand, WaitingSamples
from rollout_server.scoring.worker_seat import WorkerSeat
from shared.clock import Clock, SystemClock
from shared.config.server import ScoringConfig
from shared.errors import ConfigurationError, InvalidRequestError, ScoringError
from shared.schemas.rollouts import RewardSpec

logger = logging.getLogger(__name__)


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
        self._pace = RewardPace()
        self._waiting = WaitingSamples(self._pace)
        self._seats: list[WorkerSeat] = []
        self._owners: list[asyncio.Task[None]] = []
        self._signatures: dict[str, RewardSignature] = {
            name: read_signature(reward.function) for name, reward in BUILTIN_REWARDS.items()
        }
        self._unavailable: dict[str, str] = {}
        """Why, by built-in reward."""
        for name, reward in BUILTIN_REWARDS.items():
            reason = reward.why_unavailable(allows_code=config.allow_code_execution)
            if reason is not None:
                self._unavailable[name] = reason
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
        """End the workers; samples without a result get a ``ScoringError``. May be called again."""
        self._is_open = False
        owners, self._owners = self._owners, []
        for owner in owners:
            owner.cancel()
        await asyncio.gather(*owners, return_exceptions=True)
        # An owner that was cancelled before it ran has not closed its seat.
        await asyncio.gather(*(seat.close() for seat in self._seats))
        self._waiting.fail_all(_closed())

    @property
    def num_queued(self) -> int:
        """Samples that wait for a worker."""
        return self._waiting.num_samples

    @property
    def num_worker_restarts(self) -> int:
        """Workers replaced because they were late or had crashed."""
        return sum(seat.num_restarts for seat in self._seats)

    def reward_names(self) -> list[str]:
        """Names a request may use."""
        return sorted({*self._signatures, *self._config.rewards} - self._unavailable.keys())

    def validate_reward(self, spec: RewardSpec) -> None:
        """Check name and parameters before anything is generated.

        Raises:
            InvalidRequestError: a reward that is unknown or not available here, or a parameter that
                is unknown, missing, of the wrong type or out of range.
        """
        if spec.name in self._unavailable:
            raise InvalidRequestError(
                f"reward {spec.name!r} {self._unavailable[spec.name]}", param="reward.name"
            )
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
        """Judge one sample, as ``score_group`` does.

        Raises:
            ScoringError: the pool is closed, or cannot start a worker any more.
        """
        (outcome,) = await self.score_group([job])
        if isinstance(outcome, ScoringError):
            raise outcome
        return outcome

    async def score_group(self, jobs: Sequence[ScoreJob]) -> list[ScoreOutcome]:
        """Judge the samples of a group. A reward that fails, hangs or crashes is the status of the
        sample it was called for.

        The wait has no limit of its own: each sample, and each before it, takes
        ``scoring.timeout_s`` at the longest. A caller that gives up costs the workers what they
        have in hand, and no more than ``SLICE_S`` beyond.

        Returns:
            In the order of the jobs; a ``ScoringError`` where the pool is closed, or cannot start a
            worker any more.
        """
        if not jobs or not self._is_open:
            return [_closed() for _ in jobs]
        return await self._waiting.add(jobs).outcomes

    async def _serve(self, seat: WorkerSeat) -> None:
        """Hand samples to one seat until the pool closes."""
        try:
            while True:
                samples = await self._waiting.take()
                try:
                    await seat.run(samples.jobs, partial(self._settle_next, samples))
                except ScoringError as exc:
                    samples.settle_next(exc)
                    self._waiting.put(samples.rest)
                    continue
                except Exception:  # whatever it is: or the seat were gone, and its samples with it
                    # The seat has killed its worker; the sample it costs bounds this loop.
                    logger.exception("scoring: a sample failed for a reason of ours")
                    if len(samples.rest) > 0:
                        samples.settle_next(
                            ScoringError("internal error; the server's log has the details")
                        )
                    self._waiting.put(samples.rest)
                    continue
                except BaseException:
                    samples.settle_rest(_closed())
                    raise
                self._waiting.put(samples.rest)
                await seat.refill()
        finally:
            await seat.close()

    def _settle_next(self, samples: SamplesInHand, result: RewardResult) -> None:
        samples.settle_next(result)
        self._pace.observe(samples.reward_name, result.duration_s)


def _closed() -> ScoringError:
    return ScoringError("the scoring pool is not running: it was not started, or is closed")
