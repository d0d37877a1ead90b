"""Groups and samples as a server would send them, with only the interesting fields given."""

from __future__ import annotations

from collections.abc import Sequence

from shared.schemas.rollouts import (
    RolloutGroup,
    RolloutSample,
    SampleTimings,
    WeightVersionSpan,
)
from shared.types import FinishReason, RewardStatus


def rollout_sample(
    sample_index: int,
    *,
    reward: float | None,
    token_ids: Sequence[int] = (5, 6, 7),
    logprobs: Sequence[float] | None = None,
    text: str = "",
    finish_reason: FinishReason = FinishReason.STOP,
    reward_status: RewardStatus = RewardStatus.OK,
    stale: bool = False,
    version: int = 0,
) -> RolloutSample:
    """One sample, of a single weight version."""
    return RolloutSample(
        sample_index=sample_index,
        token_ids=list(token_ids),
        logprobs=list(logprobs) if logprobs is not None else [-1.0] * len(token_ids),
        text=text,
        finish_reason=finish_reason,
        reward=reward,
        reward_status=reward_status,
        weight_versions=[WeightVersionSpan(version=version, start=0, end=len(token_ids))],
        policy_lag=0,
        stale=stale,
        engine_id="engine-0",
        num_draft_tokens=4,
        num_accepted_tokens=2,
        timings=SampleTimings(queue_s=0.0, generate_s=0.1, score_s=0.0),
    )


def rollout_group(
    *,
    samples: Sequence[RolloutSample],
    prompt_index: int = 0,
    prompt_token_ids: Sequence[int] = (3, 4),
    answer: str | None = None,
) -> RolloutGroup:
    """One prompt's samples."""
    return RolloutGroup(
        group_id=f"group={prompt_index}",
        prompt_index=prompt_index,
        prompt_token_ids=list(prompt_token_ids),
        answer=answer,
        metadata={},
        samples=list(samples),
    )
