"""What the training loop is built from."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.batch_plan import PendingBatch
from trainer.checkpoint import CheckpointStore
from trainer.metric_sinks import MetricSinks
from trainer.optimization import Optimization
from trainer.policy import Policy
from trainer.policy_history import PolicyHistory
from trainer.publish import Publisher
from trainer.recorder import RunRecorder
from trainer.rollout_client import RolloutClient
from trainer.speculation_log import SpeculationLog
from trainer.status import StatusBoard
from trainer.tasks import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopParts:
    """What the loop works with; built in setup.py, or by a test."""

    client: RolloutClient
    task: Task
    policy: Policy
    tokenizer: Any
    optimization: Optimization
    publisher: Publisher
    checkpoints: CheckpointStore
    recorder: RunRecorder
    sinks: MetricSinks
    speculation: SpeculationLog
    board: StatusBoard
    stop: threading.Event
    run_id: str
    """Unique per process: makes request ids that no earlier attempt at the same step has used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopStart:
    """Where it begins: at step 0, or where a checkpoint was written."""

    completed_steps: int
    weight_version: int
    """What server and trainer agreed on."""
    history: PolicyHistory
    pending: Sequence[PendingBatch] = field(default=())
    """Batches that the process before had asked for."""
    is_checkpointed: bool = False
    """Whether a checkpoint of ``completed_steps`` is on disk."""
