"""Puts generated samples and their rewards together into the group that goes out. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.engine.protocol import GeneratedSample
from rollout_server.rollouts.prompts import PreparedPrompt
from rollout_server.router.router import RoutedResult
from rollout_server.scoring.types import RewardResult, ScoreJob
from shared.schemas.rollouts import (
    RewardSpec,
    RolloutGroup,
    RolloutSample,
    SampleTimings,
    WeightVersionSpan,
)
from shared.types import FinishReason, RewardStatus

SKIPPED = RewardResult(reward=None, status=RewardStatus.SKIPPED, duration_s=0.0)


def policy_lag(spans: Sequence[WeightVersionSpan], committed_version: int) -> int:
    """Versions between the oldest token and what is committed now; 0 without tokens."""
    if not spans:
        return 0
    return max(0, committed_version - min(span.version for span in spans))


def score_job(
    prompt: PreparedPrompt, sample: GeneratedSample, reward: RewardSpec | None
) -> ScoreJob | None:
    """What the scorer gets, or None when the reward is skipped."""
    if reward is None or sample.finish_reason is FinishReason.ABORT:
        return None
    return ScoreJob(
        reward=reward,
        prompt=prompt.text,
        completion=sample.text,
        prompt_token_ids=prompt.token_ids,
        token_ids=sample.token_ids,
        answer=prompt.answer,
        metadata=prompt.metadata,
    )


def build_group(
    *,
    group_id: str,
    prompt: PreparedPrompt,
    routed: RoutedResult,
    rewards: Sequence[RewardResult],
    committed_version: int,
    max_policy_lag: int | None,
) -> RolloutGroup:
    """One wire group; ``rewards`` are in the order of the samples."""
    samples = []
    for sample, reward in zip(routed.result.samples, rewards, strict=True):
        lag = policy_lag(sample.weight_versions, committed_version)
        samples.append(
            RolloutSample(
                sample_index=sample.sample_index,
                token_ids=sample.token_ids,
                logprobs=sample.logprobs,
                text=sample.text,
                finish_reason=sample.finish_reason,
                reward=reward.reward,
                reward_status=reward.status,
                reward_detail=reward.detail,
                weight_versions=sample.weight_versions,
                policy_lag=lag,
                stale=max_policy_lag is not None and lag > max_policy_lag,
                engine_id=routed.result.engine_id,
                num_draft_tokens=sample.num_draft_tokens,
                num_accepted_tokens=sample.num_accepted_tokens,
                token_origins=sample.token_origins,
                timings=SampleTimings(
                    queue_s=routed.queue_s,
                    generate_s=routed.result.generate_s,
                    score_s=reward.duration_s,
                ),
            )
        )
    return RolloutGroup(
        group_id=group_id,
        prompt_index=prompt.prompt_index,
        prompt_token_ids=prompt.token_ids,
        answer=prompt.answer,
        metadata=prompt.metadata,
        samples=samples,
    )
