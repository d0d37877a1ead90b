"""Which batches may be asked for and which may be trained on, and how long each took (pure).

With ``trainer.batches_ahead`` k and c steps completed, the batches of steps c + 1 to c + 1 + k may
be asked for, and the one of step c + 1 may be trained on. A batch that is trained on in step s was
therefore asked for when at least s - 1 - k steps were completed: its policy is at most k updates
old. With k = 0 sampling and training take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class BatchState(StrEnum):
    """Where the rollouts of a training step are."""

    ASKED = "asked"
    ARRIVED = "arrived"
    """Every group is there."""
    TAKEN = "taken"
    """Its step has begun to train on it."""
    TRAINED = "trained"
    """Its step is completed. Final."""
    WITHDRAWN = "withdrawn"
    """A stop ended its rollouts. Final: after a resume its step asks anew."""


BATCH_TRANSITIONS: dict[BatchState, frozenset[BatchState]] = {
    BatchState.ASKED: frozenset({BatchState.ARRIVED, BatchState.WITHDRAWN}),
    BatchState.ARRIVED: frozenset({BatchState.TAKEN}),
    BatchState.TAKEN: frozenset({BatchState.TRAINED}),
    BatchState.TRAINED: frozenset(),
    BatchState.WITHDRAWN: frozenset(),
}


class PendingBatch(BaseModel):
    """A batch that was asked for and not trained on, for a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTiming:
    """Moments of one batch, in seconds of one clock."""

    asked_s: float
    arrived_s: float
    wanted_s: float
    """Its step had nothing else to do any more."""
    taken_s: float

    @property
    def sample_s(self) -> float:
        """From asking to the last group."""
        return self.arrived_s - self.asked_s

    @property
    def wait_s(self) -> float:
        """How long training stood still for it."""
        return self.taken_s - self.wanted_s

    @property
    def hidden_fraction(self) -> float | None:
        """Share of the sampling during which the trainer did something else. None of nothing."""
        if self.sample_s <= 0:
            return None
        hidden_s = min(self.wanted_s, self.arrived_s) - self.asked_s
        return min(max(hidden_s / self.sample_s, 0.0), 1.0)


@dataclass(slots=True)
class _Batch:
    request_id: str
    asked_s: float
    state: BatchState = BatchState.ASKED
    arrived_s: float = 0.0
    wanted_s: float = 0.0

    def enter(self, step: int, state: BatchState) -> None:
        if state not in BATCH_TRANSITIONS[self.state]:
            raise ValueError(f"the batch of step {step} cannot go from {self.state} to {state}")
        self.state = state


class BatchPlan:
    """The batches of one run. Every method that is told of a moment takes it as an argument."""

    def __init__(self, *, completed_steps: int, num_steps: int, num_ahead: int) -> None:
        """
        Args:
            completed_steps: of the checkpoint that the run goes on from.
            num_steps: of the whole run; nothing is asked for beyond it.
            num_ahead: ``trainer.batches_ahead``.
        """
        self._completed = completed_steps
        self._num_steps = num_steps
        self._num_ahead = num_ahead
        self._batches: dict[int, _Batch] = {}

    @property
    def num_completed(self) -> int:
        """Steps that are done, whichever process did them."""
        return self._completed

    @property
    def last_step(self) -> int:
        """The furthest step whose batch may be asked for now."""
        return min(self._completed + 1 + self._num_ahead, self._num_steps)

    def due(self) -> Sequence[int]:
        """Steps whose batches may be asked for now and have not been, first things first."""
        steps = range(self._completed + 1, self.last_step + 1)
        return [step for step in steps if step not in self._batches]

    def asked(self, step: int, request_id: str, now_s: float) -> None:
        """
        Raises:
            ValueError: it is not due.
        """
        if step not in self.due():
            raise ValueError(f"step {step} is not due with {self._completed} steps completed")
        self._batches[step] = _Batch(request_id=request_id, asked_s=now_s)

    def renamed(self, step: int, request_id: str) -> None:
        """It was asked for again under another id, because the first one cannot be used."""
        self._batches[step].request_id = request_id

    def wanted(self, step: int, now_s: float) -> None:
        """Its step waits for it from now on."""
        self._batches[step].wanted_s = now_s

    def arrived(self, step: int, at_s: float) -> None:
        """The last of its groups came at ``at_s``."""
        batch = self._batches[step]
        batch.enter(step, BatchState.ARRIVED)
        batch.arrived_s = at_s

    def withdrawn(self, step: int) -> None:
        """A stop ended its rollouts."""
        self._batches[step].enter(step, BatchState.WITHDRAWN)

    def taken(self, step: int, now_s: float) -> BatchTiming:
        """Its step begins to train on it.

        Raises:
            ValueError: it is not the next step's, or has not arrived.
        """
        if step != self._completed + 1:
            raise ValueError(f"step {step} cannot follow step {self._completed}")
        batch = self._batches[step]
        batch.enter(step, BatchState.TAKEN)
        return BatchTiming(
            asked_s=batch.asked_s,
            arrived_s=batch.arrived_s,
            wanted_s=batch.wanted_s,
            taken_s=now_s,
        )

    def trained(self, step: int) -> None:
        """Its step is completed."""
        self._batches[step].enter(step, BatchState.TRAINED)
        del self._batches[step]
        self._completed = step

    def asked_steps(self) -> Sequence[int]:
        """Steps whose rollouts run, as far as is known."""
        return [step for step, batch in self._batches.items() if batch.state is BatchState.ASKED]

    def pending(self) -> tuple[PendingBatch, ...]:
        """What a run that goes on from here has to fetch again instead of asking anew."""
        return tuple(
            PendingBatch(step=step, request_id=batch.request_id)
            for step, batch in sorted(self._batches.items())
            if batch.state is not BatchState.WITHDRAWN
        )
