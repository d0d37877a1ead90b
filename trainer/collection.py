"""What the trainer asks the server for, and a batch as it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.config.trainer import TrainerConfig
from shared.schemas.rollouts import (
    RewardSpec,
    RolloutGroup,
    RolloutRequest,
    SamplingOptions,
)
from trainer.batch_plan import BatchTiming
from trainer.tasks import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledBatch:
    """The groups of one step, in no order, and how they came."""

    groups: list[RolloutGroup]
    timing: BatchTiming
    num_groups_again: int
    """Of these, sampled a second time: their first samples were aborted or too old."""

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(sample.token_ids) for group in self.groups for sample in group.samples)


def training_request(
    request_id: str, problems: Sequence[Problem], config: TrainerConfig
) -> RolloutRequest:
    """``group_size`` samples of each problem at the training temperature."""
    return RolloutRequest(
        request_id=request_id,
        prompts=[problem.to_prompt_item() for problem in problems],
        n=config.group_size,
        sampling=SamplingOptions(
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_tokens=config.sampling.max_tokens,
        ),
        reward=RewardSpec(name=config.reward.name, params=config.reward.params),
        max_policy_lag=config.max_policy_lag,
        stream=True,
    )


def evaluation_request(
    request_id: str, problems: Sequence[Problem], config: TrainerConfig
) -> RolloutRequest:
    """One sample of each problem at the evaluation temperature (0 is greedy)."""
    return RolloutRequest(
        request_id=request_id,
        prompts=[problem.to_prompt_item() for problem in problems],
        n=1,
        sampling=SamplingOptions(
            temperature=config.sampling.eval_temperature,
            top_p=config.sampling.top_p if config.sampling.eval_temperature > 0 else 1.0,
            max_tokens=config.sampling.max_tokens,
        ),
        reward=RewardSpec(name=config.reward.name, params=config.reward.params),
        stream=True,
    )
