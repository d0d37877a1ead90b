"""The training loop: rollouts, update, push, again. Runs in the trainer actor.

With ``trainer.batches_ahead`` 0 it samples and trains by turns. With more, batches of later steps
are sampled meanwhile (see batch_plan.py), and a push finds rollouts running: what they see of it
is the server's ``weights.pause_mode``.

Waits for the server only (rollouts, pushes), each wait bounded by ``trainer.api_timeout_s``. A stop
takes effect between groups and between phases: after an update the push is always tried, so that
what is served and what is checkpointed are the same policy. A checkpoint that is due is written
while the push runs and becomes valid after it, with the version the server has then.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from shared.clock import SystemClock
from shared.config.run import RunConfig
from shared.errors import SlipstreamError, UnavailableError
from shared.schemas.rollouts import RolloutGroup, RolloutSample
from trainer.advantages import with_advantages
from trainer.background_push import BackgroundPush
from trainer.batches import TrainingBatches
from trainer.checkpointing import Checkpointing
from trainer.collection import SampledBatch, evaluation_request
from trainer.evaluation import evaluate_groups, evaluation_metrics
from trainer.loop_parts import LoopParts, LoopStart
from trainer.publish import PushReport
from trainer.samples import select
from trainer.sampling import Sampler
from trainer.speculation_log import DraftCounts
from trainer.status import MetricsRecord, TrainerPhase
from trainer.step_metrics import StepFacts, step_metrics
from trainer.update import UpdateReport, train_on

LOGGER = logging.getLogger(__name__)


class TrainingLoop:
    """Trains from ``start.completed_steps`` to ``trainer.num_steps``."""

    def __init__(self, parts: LoopParts, config: RunConfig, start: LoopStart) -> None:
        self._parts = parts
        self._config = config
        self._clock = SystemClock()
        self._step = start.completed_steps
        self._version = start.weight_version
        self._history = start.history
        self._sampler = Sampler(parts.client, parts.stop, self._clock)
        self._batches = TrainingBatches(
            sampler=self._sampler,
            task=parts.task,
            recorder=parts.recorder,
            config=config.trainer,
            clock=self._clock,
            run_id=parts.run_id,
            completed_steps=start.completed_steps,
            pending=start.pending,
        )
        self._checkpoints = Checkpointing(
            parts.checkpoints,
            parts.policy,
            parts.optimization,
            parts.tokenizer,
            config,
            finished_step=start.completed_steps if start.is_checkpointed else None,
        )

    def abort_rollouts(self) -> None:
        """End the rollouts that run, if any. Called from another thread, after a stop."""
        self._sampler.abort_all()

    def run(self) -> TrainerPhase:
        """Train to the end or to the stop. Returns FINISHED or STOPPED, with a checkpoint saved.

        Raises:
            SlipstreamError: the server refused a request or a push, or stayed away too long.
        """
        try:
            return self._run()
        finally:
            # Nobody waits for rollouts any more: a client that still tries to reach the server
            # for them gives up.
            self._parts.stop.set()
            self._sampler.close()
            self._checkpoints.discard()

    def _run(self) -> TrainerPhase:
        trainer, board = self._config.trainer, self._parts.board
        board.completed(self._step, self._version)
        if self._step == 0 and not self._parts.stop.is_set():
            metrics = self._evaluate()
            self._write_metrics(
                {
                    "step": 0,
                    "time_s": self._clock.wall_s(),
                    "weights/version": self._version,
                    **metrics,
                }
            )
        while self._step < trainer.num_steps and not self._parts.stop.is_set():
            if not self._run_step():
                break
            if self._checkpoints.is_due(self._step):
                self._checkpoint()
        if self._parts.stop.is_set():
            self._sampler.abort_all()
        self._checkpoint()
        stopped = self._step < trainer.num_steps
        return TrainerPhase.STOPPED if stopped else TrainerPhase.FINISHED

    def _run_step(self) -> bool:
        """One step; False when a stop ended it before anything was updated."""
        parts, trainer = self._parts, self._config.trainer
        step = self._step + 1
        began_s = self._clock.monotonic_s()
        counts_before = self._draft_counts()
        batch = self._next_batch(step)
        if batch is None or parts.stop.is_set():
            return False
        selection = select(batch.groups, self._is_stale)
        samples = with_advantages(
            selection.groups, normalize_by_std=trainer.objective.normalize_by_std
        )
        sampled_from = self._history
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
            self._history = self._history.updated()
            push = self._push(step)
        else:
            LOGGER.warning(
                "step %d: no group has both better and worse samples; the policy stays as it is",
                step,
            )
        self._step = step
        self._batches.trained(step)
        duration_s = self._clock.monotonic_s() - began_s
        every = trainer.eval_every
        due = step == trainer.num_steps or (every and step % every == 0)
        evaluation = self._evaluate() if due and not parts.stop.is_set() else {}
        facts = StepFacts(
            step=step,
            time_s=self._clock.wall_s(),
            duration_s=duration_s,
            batch=batch,
            selection=selection,
            history=sampled_from,
            update=update,
            push=push,
            weight_version=self._version,
            draft_counts_before=counts_before,
            draft_counts_after=self._draft_counts(),
        )
        self._record(facts, evaluation)
        return True

    def _next_batch(self, step: int) -> SampledBatch | None:
        parts = self._parts
        parts.board.enter(TrainerPhase.ROLLOUT)
        self._batches.ask()
        waiting: AbstractContextManager[None] = nullcontext()
        if self._config.trainer.batches_ahead:
            # By turns, the span of the batch itself is the waiting.
            waiting = parts.recorder.span("wait", step)
        with waiting:
            return self._batches.take(step, self._is_stale, parts.board.groups)

    def _is_stale(self, sample: RolloutSample) -> bool:
        # Not as the server said when it delivered: pushes may have come since, and a resumed run
        # has given the same weights another version.
        lag = self._history.lag(sample.weight_versions)
        return lag is None or lag > self._config.trainer.max_policy_lag

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
        self._history = self._history.served(report.version)
        return report

    def _evaluate(self) -> dict[str, float | None]:
        parts, trainer = self._parts, self._config.trainer
        parts.board.enter(TrainerPhase.EVAL)
        if parts.stop.is_set():
            return {}
        problems = parts.task.held_out(trainer.eval_prompts)
        request = evaluation_request(f"{parts.run_id}/eval={self._step}", problems, trainer)

        def on_group(group: RolloutGroup) -> None:
            """Held-out samples are not recorded."""

        with parts.recorder.span("eval", self._step):
            asked = self._sampler.start(request, on_group)
            is_whole = self._sampler.wait(
                asked, lambda num_groups: parts.board.groups(num_groups, len(problems))
            )
        if not is_whole:
            return {}
        result = evaluate_groups(asked.groups)
        if result.num_unscored:
            LOGGER.warning(
                "%d of %d evaluation samples have no reward and count as wrong",
                result.num_unscored,
                result.num_problems,
            )
        return evaluation_metrics(result, asked.ended_s - asked.asked_s)

    def _record(self, facts: StepFacts, evaluation: dict[str, float | None]) -> None:
        record = step_metrics(facts) | evaluation
        self._write_metrics(record)
        self._parts.board.completed(facts.step, self._version, record)
        LOGGER.info(
            "step %d of %d: reward %.3f, %d completion tokens in %.1f s, version %d",
            facts.step,
            self._config.trainer.num_steps,
            record["reward/mean"] or 0.0,
            facts.batch.num_completion_tokens,
            facts.batch.timing.sample_s,
            self._version,
        )

    def _write_metrics(self, record: MetricsRecord) -> None:
        self._parts.recorder.metrics(record)
        self._parts.sinks.write(record)

    def _draft_counts(self) -> dict[str, DraftCounts]:
        try:
            return self._parts.speculation.poll()
        except SlipstreamError as exc:
            LOGGER.warning("no speculation counters for this step: %s", exc.message)
            return {}

    def _checkpoint(self) -> None:
        self._parts.board.enter(TrainerPhase.CHECKPOINT)
        self._checkpoints.finish(self._step, self._version, self._history, self._batches.pending())
