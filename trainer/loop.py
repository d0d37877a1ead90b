"""The synchronous training loop: rollouts, update, push, again. Runs in the trainer actor.

Waits for the server only (rollouts, pushes), each wait bounded by ``trainer.api_timeout_s``. A stop
takes effect between groups and between phases: after an update the push is always tried, so that
what is served and what is checkpointed are the same policy. A checkpoint that is due is written
while the push runs and becomes valid after it, with the version the server has then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.clock import SystemClock
from shared.config.run import RunConfig
from shared.errors import SlipstreamError, UnavailableError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest
from trainer.advantages import with_advantages
from trainer.background_push import BackgroundPush
from trainer.checkpoint import CheckpointStore
from trainer.checkpointing import Checkpointing
from trainer.collection import Collected, collect, evaluation_request, training_request
from trainer.evaluation import evaluate_groups
from trainer.optimization import Optimization
from trainer.policy import Policy
from trainer.publish import Publisher, PushReport
from trainer.recorder import RunRecorder
from trainer.rollout_client import RolloutClient
from trainer.samples import Selection, select
from trainer.speculation_log import DraftCounts, SpeculationLog
from trainer.status import StatusBoard, TrainerPhase
from trainer.step_metrics import StepFacts, step_metrics
from trainer.tasks import Problem, Task
from trainer.update import UpdateReport, train_on

LOGGER = logging.getLogger(__name__)


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
    speculation: SpeculationLog
    board: StatusBoard
    stop: threading.Event
    run_id: str
    """Unique per process: makes request ids that no earlier attempt at the same step has used."""


class TrainingLoop:
    """Trains from ``completed_steps`` to ``trainer.num_steps``."""

    def __init__(
        self, parts: LoopParts, config: RunConfig, *, completed_steps: int, weight_version: int
    ) -> None:
        self._parts = parts
        self._config = config
        self._step = completed_steps
        self._version = weight_version
        self._active_request_id: str | None = None
        self._checkpoints = Checkpointing(
            parts.checkpoints, parts.policy, parts.optimization, parts.tokenizer, config
        )

    def abort_rollouts(self) -> None:
        """End the rollouts being waited for, if any. Called from another thread, after a stop."""
        request_id = self._active_request_id
        if request_id is None:
            return
        try:
            self._parts.client.abort(request_id)
        except SlipstreamError as exc:
            LOGGER.warning("rollouts %s could not be aborted: %s", request_id, exc.message)

    def run(self) -> TrainerPhase:
        """Train to the end or to the stop. Returns FINISHED or STOPPED, with a checkpoint saved.

        Raises:
            SlipstreamError: the server refused a request or a push, or stayed away too long.
        """
        try:
            return self._run()
        finally:
            self._checkpoints.discard()

    def _run(self) -> TrainerPhase:
        trainer, board = self._config.trainer, self._parts.board
        board.completed(self._step, self._version)
        if self._step == 0 and not self._parts.stop.is_set():
            metrics = self._evaluate()
            self._parts.recorder.metrics(
                {
                    "step": 0,
                    "time_s": SystemClock().wall_s(),
                    "weights/version": self._version,
                    **metrics,
                }
            )
        while self._step < trainer.num_steps and not self._parts.stop.is_set():
            if not self._run_step():
                break
            if self._checkpoints.is_due(self._step):
                self._checkpoint()
        self._checkpoint()
        stopped = self._step < trainer.num_steps
        return TrainerPhase.STOPPED if stopped else TrainerPhase.FINISHED

    def _run_step(self) -> bool:
        """One step; False when a stop ended it before anything was updated."""
        parts, trainer = self._parts, self._config.trainer
        step = self._step + 1
        counts_before = self._draft_counts()
        collected = self._rollouts(step)
        if parts.stop.is_set():
            return False
        selection = select(collected.groups)
        samples = with_advantages(
            selection.groups, normalize_by_std=trainer.objective.normalize_by_std
        )
        update: UpdateReport | None = None
        push: PushReport | None = None
        if samples:
            parts.board.enter(TrainerPhase.TRAIN)
            with parts.recorder.span("train", step):
                update = train_on(
                    samples,
                    policy=parts.policy,
                    optimization=parts.optimization,
                    config=trainer,
                    weight_version=self._version,
                    seed=f"{self._config.seed}/{step}",
                )
            push = self._push(step)
        else:
            LOGGER.warning(
                "step %d: no group has both better and worse samples; the policy stays as it is",
                step,
            )
        self._step = step
        every = trainer.eval_every
        due = step == trainer.num_steps or (every and step % every == 0)
        evaluation = self._evaluate() if due and not parts.stop.is_set() else {}
        self._record(step, collected, selection, update, push, evaluation, counts_before)
        return True

    def _rollouts(self, step: int) -> Collected:
        parts, trainer = self._parts, self._config.trainer
        # The task counts from 0: step 1 trains on batch 0.
        problems = parts.task.train_batch(step - 1, trainer.prompts_per_step)
        request = training_request(f"{parts.run_id}/step={step}", problems, trainer)
        parts.board.enter(TrainerPhase.ROLLOUT)
        with parts.recorder.span("rollout", step):
            return self._collect(request, problems, step)

    def _collect(
        self, request: RolloutRequest, problems: Sequence[Problem], record_as: int | None
    ) -> Collected:
        parts = self._parts
        num_groups = 0
        parts.board.groups(0, len(problems))
        nothing = Collected(groups=[], rollout_s=0.0)

        def on_group(group: RolloutGroup) -> None:
            nonlocal num_groups
            num_groups += 1
            if parts.stop.is_set():
                # Again: the abort of the stop may have come before the request was there.
                self.abort_rollouts()
            parts.board.groups(num_groups, len(problems))
            if record_as is not None:
                text = problems[group.prompt_index].prompt_text
                parts.recorder.rollouts(record_as, group, text)

        self._active_request_id = request.request_id
        try:
            if parts.stop.is_set():
                return nothing
            return collect(parts.client, request, on_group)
        except SlipstreamError:
            if not parts.stop.is_set():
                raise
            # The stop aborted the request; how its stream ended does not matter any more.
            return nothing
        finally:
            self._active_request_id = None

    def _push(self, step: int) -> PushReport | None:
        """Push the new weights; None when a stop came while the server was away."""
        parts = self._parts
        parts.board.enter(TrainerPhase.PUSH)
        publish = partial(
            parts.publisher.publish,
            parts.policy,
            version=self._version + 1,
            base_version=self._version,
        )
        with parts.recorder.span("push", step), BackgroundPush(publish) as push:
            if self._checkpoints.is_due(step):
                self._checkpoints.begin(step)
            try:
                report = push.wait()
            except UnavailableError as exc:
                if not parts.stop.is_set():
                    raise
                # Whether it arrived does not matter: a resumed run pushes above what is committed.
                LOGGER.warning("stopped before version %d was answered: %s", self._version + 1, exc)
                return None
        self._version = report.version
        return report

    def _evaluate(self) -> dict[str, float | None]:
        parts, trainer = self._parts, self._config.trainer
        parts.board.enter(TrainerPhase.EVAL)
        problems = parts.task.held_out(trainer.eval_prompts)
        request = evaluation_request(f"{parts.run_id}/eval={self._step}", problems, trainer)
        with parts.recorder.span("eval", self._step):
            collected = self._collect(request, problems, None)
        if parts.stop.is_set():
            return {}
        result = evaluate_groups(collected.groups)
        if result.num_unscored:
            LOGGER.warning(
                "%d of %d evaluation samples have no reward and count as wrong",
                result.num_unscored,
                result.num_problems,
            )
        return {
            "eval/accuracy": result.accuracy,
            "eval/mean_reward": result.mean_reward,
            "eval/mean_completion_tokens": result.mean_completion_tokens,
            "phase/eval_s": collected.rollout_s,
        }

    def _record(
        self,
        step: int,
        collected: Collected,
        selection: Selection,
        update: UpdateReport | None,
        push: PushReport | None,
        evaluation: dict[str, float | None],
        counts_before: dict[str, DraftCounts],
    ) -> None:
        record = step_metrics(
            StepFacts(
                step=step,
                time_s=SystemClock().wall_s(),
                collected=collected,
                selection=selection,
                update=update,
                push=push,
                weight_version=self._version,
                draft_counts_before=counts_before,
                draft_counts_after=self._draft_counts(),
            )
        ) | evaluation  # fmt: skip
        self._parts.recorder.metrics(record)
        self._parts.board.completed(step, self._version, record)
        LOGGER.info(
            "step %d of %d: reward %.3f, %d completion tokens in %.1f s, version %d",
            step,
            self._config.trainer.num_steps,
            record["reward/mean"] or 0.0,
            collected.num_completion_tokens,
            collected.rollout_s,
            self._version,
        )

    def _draft_counts(self) -> dict[str, DraftCounts]:
        try:
            return self._parts.speculation.poll()
        except SlipstreamError as exc:
            LOGGER.warning("no speculation counters for this step: %s", exc.message)
            return {}

    def _checkpoint(self) -> None:
        self._parts.board.enter(TrainerPhase.CHECKPOINT)
        self._checkpoints.finish(self._step, self._version)
