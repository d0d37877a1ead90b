"""Asks the server for a batch of rollouts and takes the groups as they finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from shared.config.trainer import TrainerConfig
from shared.schemas.rollouts import (
    RewardSpec,
    RolloutGroup,
    RolloutRequest,
    SamplingOptions,
)
from trainer.rollout_client import RolloutClient
from trainer.tasks import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """The groups of one request, in order of finishing."""

    groups: list[RolloutGroup]
    rollout_s: float

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


def collect(
    client: RolloutClient,
    request: RolloutRequest,
    on_group: Callable[[RolloutGroup], None],
) -> Collected:
    """Run a request to its end; ``on_group`` sees every group as it arrives.

    Raises:
        SlipstreamError: the server refused the request or stayed away too long.
    """
    started_s = monotonic()
    groups = []
    for group in client.stream_groups(request):
        groups.append(group)
        on_group(group)
    return Collected(groups=groups, rollout_s=monotonic() - started_s)
