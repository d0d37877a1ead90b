"""When the loop writes checkpoints, and the one that is being written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import monotonic
from typing import Any

from shared.config.run import RunConfig
from trainer.batch_plan import PendingBatch
from trainer.checkpoint import CheckpointDraft, CheckpointStore, TrainerState
from trainer.optimization import Optimization
from trainer.policy import Policy
from trainer.policy_history import PolicyHistory

LOGGER = logging.getLogger(__name__)


class Checkpointing:
    """``begin`` writes what is large while the weights are pushed; ``finish`` makes it valid."""

    def __init__(
        self,
        store: CheckpointStore,
        policy: Policy,
        optimization: Optimization,
        tokenizer: Any,
        config: RunConfig,
        *,
        finished_step: int | None = None,
    ) -> None:
        """
        Args:
            finished_step: of the checkpoint that the run goes on from. It is not written again by
                a run that trains nothing: it is what that one would write, and names more batches.
        """
        self._store = store
        self._policy = policy
        self._optimization = optimization
        self._tokenizer = tokenizer
        self._config = config
        self._begun: CheckpointDraft | None = None
        self._began_s = 0.0
        self._finished_step = finished_step

    def is_due(self, step: int) -> bool:
        """Whether the run keeps a checkpoint of this step: every so many, and of the last one."""
        every = self._config.trainer.checkpoint_every
        return step == self._config.trainer.num_steps or bool(every and step % every == 0)

    def begin(self, step: int) -> None:
        """Write weights and moments as they are now; they must stay so until ``finish``."""
        self._began_s = monotonic()
        self._begun = self._store.draft(step, self._policy, self._optimization, self._tokenizer)

    def finish(
        self,
        step: int,
        weight_version: int,
        history: PolicyHistory,
        pending: Sequence[PendingBatch],
    ) -> None:
        """The checkpoint of ``step`` is on disk afterwards, whether it was begun or not.

        Args:
            pending: batches that a run which goes on from here fetches again.

        Raises:
            SlipstreamError: the disk does not take it.
        """
        if self._finished_step == step:
            return
        if self._begun is None:
            self.begin(step)
        assert self._begun is not None
        draft, self._begun = self._begun, None
        path = draft.complete(
            TrainerState(
                step=step,
                weight_version=weight_version,
                num_updates=self._optimization.num_updates,
                seed=self._config.seed,
                revision=history.revision,
                versions=dict(history.versions),
                pending=tuple(pending),
            )
        )
        self._finished_step = step
        LOGGER.info("checkpoint %s, begun %.1f s ago", path, monotonic() - self._began_s)

    def discard(self) -> None:
        """Remove what was begun and not finished: its weights were refused, or the run failed."""
        if self._begun is not None:
            self._begun.discard()
            self._begun = None
