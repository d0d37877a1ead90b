"""The samples that wait for a worker, and the groups they belong to.

A group is split into spans: what one frame may hold, and what is left of it. Spans wait in the
order of their groups, and inside a group in the order of its samples, so that what a worker gives
back, or loses, comes before younger groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from rollout_server.scoring.pace import MAX_BATCH_CHARS, RewardPace
from rollout_server.scoring.types import ScoreJob, ScoreOutcome
from shared.errors import ScoringError


class WaitingGroup:
    """The samples of one call, and what became of those that are done."""

    def __init__(self, jobs: Sequence[ScoreJob], number: int) -> None:
        self.jobs = jobs
        self.number = number
        self.outcomes: asyncio.Future[list[ScoreOutcome]] = (
            asyncio.get_running_loop().create_future()
        )
        """There when every sample has its own."""
        self._by_index: dict[int, ScoreOutcome] = {}

    @property
    def is_abandoned(self) -> bool:
        """Its caller gave up."""
        return self.outcomes.cancelled()

    def settle(self, index: int, outcome: ScoreOutcome) -> None:
        """Note what became of a sample, once."""
        assert index not in self._by_index, "a sample was scored twice"
        self._by_index[index] = outcome
        if len(self._by_index) == len(self.jobs) and not self.outcomes.done():
            self.outcomes.set_result([self._by_index[place] for place in range(len(self.jobs))])


@dataclass(order=True, frozen=True, kw_only=True, slots=True)
class SampleSpan:
    """Samples ``[start, end)`` of a group. Ordered by age."""

    number: int
    start: int
    end: int = field(compare=False)
    group: WaitingGroup = field(compare=False, repr=False)

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def jobs(self) -> Sequence[ScoreJob]:
        """Its samples."""
        return self.group.jobs[self.start : self.end]

    @property
    def reward_name(self) -> str:
        """Which reward judges them."""
        return self.group.jobs[self.start].reward.name

    def after(self, num_samples: int) -> SampleSpan:
        """Without the first ones; may be empty."""
        return replace(self, start=self.start + num_samples)

    def first(self, num_samples: int) -> SampleSpan:
        """Only the first ones."""
        return replace(self, end=self.start + num_samples)

    def num_in_one_frame(self, num_wanted: int) -> int:
        """How many of its first samples, ``num_wanted`` at most, can share a frame; one always."""
        first = self.group.jobs[self.start]
        num_chars = len(first.completion)
        for index in range(self.start + 1, min(self.end, self.start + num_wanted)):
            job = self.group.jobs[index]
            num_chars += len(job.completion)
            if num_chars > MAX_BATCH_CHARS or not job.shares_question_with(first):
                return index - self.start
        return min(len(self), num_wanted)


class SamplesInHand:
    """A span that a worker has; results come in the order of its samples."""

    def __init__(self, span: SampleSpan) -> None:
        self.jobs = span.jobs
        self.reward_name = span.reward_name
        self._span = span
        self._num_settled = 0

    @property
    def rest(self) -> SampleSpan:
        """What has no outcome yet."""
        return self._span.after(self._num_settled)

    def settle_next(self, outcome: ScoreOutcome) -> None:
        """Note what became of the first one that has no outcome yet."""
        self._span.group.settle(self._span.start + self._num_settled, outcome)
        self._num_settled += 1

    def settle_rest(self, error: ScoringError) -> None:
        """The pool cannot judge them any more."""
        for _ in range(len(self.rest)):
            self.settle_next(error)


class WaitingSamples:
    """The queue in front of the workers: first come, first served."""

    def __init__(self, pace: RewardPace) -> None:
        self._pace = pace
        self._numbers = count()
        self._spans: asyncio.PriorityQueue[SampleSpan] = asyncio.PriorityQueue()
        self.num_samples = 0
        """That wait."""

    def add(self, jobs: Sequence[ScoreJob]) -> WaitingGroup:
        """Queue a group of one sample or more."""
        group = WaitingGroup(jobs, next(self._numbers))
        self.put(SampleSpan(number=group.number, start=0, end=len(jobs), group=group))
        return group

    def put(self, span: SampleSpan) -> None:
        """Queue samples of a group, or what is left of them."""
        if len(span) > 0:
            self.num_samples += len(span)
            self._spans.put_nowait(span)

    async def take(self) -> SamplesInHand:
        """Wait for what the next frame should hold."""
        while True:
            span = await self._spans.get()
            self.num_samples -= len(span)
            if span.group.is_abandoned:
                continue
            wanted = self._pace.num_samples(span.reward_name)
            num_taken = span.num_in_one_frame(wanted)
            self.put(span.after(num_taken))
            return SamplesInHand(span.first(num_taken))

    def fail_all(self, error: ScoringError) -> None:
        """The pool cannot judge any of them any more."""
        while not self._spans.empty():
            SamplesInHand(self._spans.get_nowait()).settle_rest(error)
        self.num_samples = 0
