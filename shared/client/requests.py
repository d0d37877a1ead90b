"""Rollout requests from what a trainer has at hand."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from shared.schemas.rollouts import PromptItem, RewardSpec, RolloutRequest, SamplingOptions


def rollout_request(
    prompts: Sequence[str | Sequence[int] | PromptItem],
    *,
    n: int = 1,
    sampling: SamplingOptions | None = None,
    reward: str | RewardSpec | None = None,
    max_policy_lag: int | None = None,
    over_provision: int = 0,
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> RolloutRequest:
    """A request to stream, with an id of its own so that repeating it is safe.

    Args:
        prompts: text, token ids, or a ``PromptItem`` with a chat, an answer or metadata.
        n: samples per prompt.
        reward: a registered reward by name, or with its parameters.
        over_provision: samples per prompt begun beyond ``n``; those that finish first are kept.
        deadline_s: after this many seconds whatever is unfinished ends with what there is.
        request_id: one that your trainer can make up again (run and step) lets it fetch the result
            after a crash; a random one by default.
    """
    return RolloutRequest(
        request_id=request_id or f"client-{uuid.uuid4().hex}",
        prompts=[_prompt_item(prompt) for prompt in prompts],
        n=n,
        sampling=sampling or SamplingOptions(),
        reward=RewardSpec(name=reward) if isinstance(reward, str) else reward,
        max_policy_lag=max_policy_lag,
        over_provision=over_provision,
        deadline_s=deadline_s,
        stream=True,
    )


def _prompt_item(prompt: str | Sequence[int] | PromptItem) -> PromptItem:
    if isinstance(prompt, PromptItem):
        return prompt
    if isinstance(prompt, str):
        return PromptItem(prompt=prompt)
    return PromptItem(prompt_token_ids=list(prompt))
