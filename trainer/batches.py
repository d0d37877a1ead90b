"""A run's batches: asked for as early as the plan allows, handed out in order, fit to train on.

A batch of an earlier process is fetched by its request id. A server that still has it gives the
same samples again, one that does not starts it. Groups that cannot be trained on (aborted, or of a
policy that is too old or unknown) are sampled once more when their step wants them; no push comes
meanwhile, so that their policy is the newest. What is unfit even then is left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from shared.clock import Clock
from shared.config.trainer import TrainerConfig
from shared.errors import ConflictError
from shared.schemas.rollouts import RolloutGroup
from trainer.batch_plan import BatchPlan, PendingBatch
from trainer.collection import SampledBatch, training_request
from trainer.recorder import RunRecorder
from trainer.samples import IsStale, unfit_prompts
from trainer.sampling import RequestState, Sampler, SamplingRequest
from trainer.tasks import Problem, Task

LOGGER = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with groups that are there, and groups expected."""


class TrainingBatches:
    """Used by one thread; the requests run in threads of their own."""

    def __init__(
        self,
        *,
        sampler: Sampler,
        task: Task,
        recorder: RunRecorder,
        config: TrainerConfig,
        clock: Clock,
        run_id: str,
        completed_steps: int,
        pending: Sequence[PendingBatch],
    ) -> None:
        """
        Args:
            run_id: of this process, so that new requests never get the id of an earlier one.
            pending: what the process before had asked for (``TrainerState.pending``).
        """
        self._sampler = sampler
        self._task = task
        self._recorder = recorder
        self._config = config
        self._clock = clock
        self._run_id = run_id
        self._earlier = {batch.step: batch.request_id for batch in pending}
        self._plan = BatchPlan(
            completed_steps=completed_steps,
            num_steps=config.num_steps,
            num_ahead=config.batches_ahead,
        )
        self._requests: dict[int, SamplingRequest] = {}
        self._wanted_s = clock.monotonic_s()

    def ask(self) -> None:
        """Ask for everything that is due. From now on the next step waits for its batch."""
        # Before: by turns, not a moment of the sampling counts as hidden.
        self._wanted_s = self._clock.monotonic_s()
        for step in self._plan.due():
            request_id = self._earlier.get(step, self._new_id(step))
            request = self._start(step, request_id, self._problems(step))
            self._requests[step] = request
            self._plan.asked(step, request_id, request.asked_s)

    def take(self, step: int, is_stale: IsStale, on_progress: OnProgress) -> SampledBatch | None:
        """Wait for the batch of the next step; None when a stop came first.

        Raises:
            SlipstreamError: its rollouts failed.
        """
        problems = self._problems(step)

        def on_news(num_groups: int) -> None:
            on_progress(num_groups, len(problems))

        self._plan.wanted(step, self._wanted_s)
        if not self._wait(step, problems, on_news):
            return None
        self._note_ends()
        groups = self._requests[step].groups
        unfit = unfit_prompts(groups, len(problems), is_stale)
        if unfit:
            fresh = self._sample_again(step, problems, unfit)
            if fresh is None:
                return None
            groups = [group for group in groups if group.prompt_index not in unfit] + fresh
        # In the order of the prompts: the same samples make the same update, however they came.
        groups = sorted(groups, key=lambda group: group.prompt_index)
        timing = self._plan.taken(step, self._clock.monotonic_s())
        return SampledBatch(groups=groups, timing=timing, num_groups_again=len(unfit))

    def trained(self, step: int) -> None:
        """The step is completed."""
        self._plan.trained(step)
        del self._requests[step]

    def pending(self) -> tuple[PendingBatch, ...]:
        """For a checkpoint: what was asked for, by whichever process, and is neither trained on nor
        ended by a stop."""
        self._note_ends()
        not_fetched_yet = (
            PendingBatch(step=step, request_id=request_id)
            for step, request_id in sorted(self._earlier.items())
            if step > self._plan.num_completed and step not in self._requests
        )
        # Steps are asked for in their order, so these come after the others.
        return self._plan.pending() + tuple(not_fetched_yet)

    def _note_ends(self) -> None:
        """Tell the plan what has ended. One that failed stays asked for: its step raises why."""
        for step in self._plan.asked_steps():
            request = self._requests[step]
            if request.state is RequestState.FINISHED:
                self._plan.arrived(step, request.ended_s)
            elif request.state is RequestState.ABORTED:
                self._plan.withdrawn(step)

    def _wait(self, step: int, problems: Sequence[Problem], on_news: Callable[[int], None]) -> bool:
        try:
            return self._sampler.wait(self._requests[step], on_news)
        except ConflictError as exc:
            if self._earlier.pop(step, None) is None:
                raise
            # The settings are others than when it was asked for, so that its samples are too.
            LOGGER.warning("step %d is sampled anew: %s", step, exc.message)
        request_id = self._new_id(step)
        self._requests[step] = self._start(step, request_id, problems)
        self._plan.renamed(step, request_id)
        return self._sampler.wait(self._requests[step], on_news)

    def _sample_again(
        self, step: int, problems: Sequence[Problem], unfit: Sequence[int]
    ) -> list[RolloutGroup] | None:
        LOGGER.warning(
            "step %d: %d of %d groups were aborted, or are of a policy more than "
            "trainer.max_policy_lag %d updates old or of an unknown one; they are sampled again",
            step,
            len(unfit),
            len(problems),
            self._config.max_policy_lag,
        )
        chosen = [problems[index] for index in unfit]
        request = self._start(step, f"{self._new_id(step)}/again", chosen)
        if not self._sampler.wait(request, lambda num_groups: None):
            return None
        return [
            group.model_copy(update={"prompt_index": unfit[group.prompt_index]})
            for group in request.groups
        ]

    def _start(self, step: int, request_id: str, problems: Sequence[Problem]) -> SamplingRequest:
        def on_group(group: RolloutGroup) -> None:
            self._recorder.rollouts(step, group, problems[group.prompt_index].prompt_text)

        def within() -> AbstractContextManager[None]:
            return self._recorder.span("rollout", step)

        request = training_request(request_id, problems, self._config)
        return self._sampler.start(request, on_group, within=within)

    def _problems(self, step: int) -> Sequence[Problem]:
        # The task counts from 0: step 1 trains on batch 0.
        return self._task.train_batch(step - 1, self._config.prompts_per_step)

    def _new_id(self, step: int) -> str:
        return f"{self._run_id}/step={step}"
