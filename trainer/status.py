"""What the trainer is doing, readable from other threads while it does it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

MetricsRecord = Mapping[str, float | int | None]
"""One line of ``metrics.jsonl``: flat ``component/name`` keys."""


class TrainerPhase(StrEnum):
    """Where in its life the trainer is; the last three are final."""

    STARTING = "starting"
    EVAL = "eval"
    ROLLOUT = "rollout"
    TRAIN = "train"
    PUSH = "push"
    CHECKPOINT = "checkpoint"
    FINISHED = "finished"
    """All steps done."""
    STOPPED = "stopped"
    """Stopped on request, with a checkpoint."""
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerStatus:
    """A snapshot."""

    phase: TrainerPhase
    step: int
    """Steps completed."""
    num_steps: int
    weight_version: int
    num_groups: int = 0
    """Groups of the current batch that have arrived."""
    num_groups_expected: int = 0
    metrics: MetricsRecord = field(default_factory=dict)
    """Of the latest step."""


class StatusBoard:
    """The latest ``TrainerStatus``: the loop writes, ``TrainerActor.status`` reads."""

    def __init__(self, num_steps: int) -> None:
        self._lock = threading.Lock()
        self._status = TrainerStatus(
            phase=TrainerPhase.STARTING, step=0, num_steps=num_steps, weight_version=0
        )

    def read(self) -> TrainerStatus:
        """The current snapshot."""
        with self._lock:
            return self._status

    def enter(self, phase: TrainerPhase) -> None:
        """A phase begins."""
        with self._lock:
            self._status = replace(self._status, phase=phase, num_groups=0, num_groups_expected=0)

    def groups(self, num_groups: int, num_groups_expected: int) -> None:
        """So many groups of the batch are here."""
        with self._lock:
            self._status = replace(
                self._status, num_groups=num_groups, num_groups_expected=num_groups_expected
            )

    def completed(
        self, step: int, weight_version: int, metrics: MetricsRecord | None = None
    ) -> None:
        """A step is done; absent metrics leave the earlier ones."""
        with self._lock:
            self._status = replace(
                self._status,
                step=step,
                weight_version=weight_version,
                metrics=self._status.metrics if metrics is None else metrics,
            )
