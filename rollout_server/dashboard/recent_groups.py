"""Delivered groups: the latest few with their tokens, and rewards by weight version. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.errors import UnknownResourceError
from shared.schemas.dashboard import (
    GroupTokens,
    RecentGroup,
    RecentSample,
    SampleTokens,
    VersionReward,
)
from shared.schemas.rollouts import RolloutGroup, RolloutSample

MAX_GROUPS = 40
MAX_GROUPS_PER_TICK = 10
"""The latest are taken; at thousands a second nobody could look at more."""
MAX_SAMPLES_PER_GROUP = 8
MAX_TOKENS_PER_SAMPLE = 2048
MAX_KEPT_TOKENS = 100_000
MAX_VERSIONS = 400
PREVIEW_CHARACTERS = 160


@dataclass(slots=True)
class _Tally:
    num_samples: int = 0
    reward_sum: float = 0.0
    num_at_least_one: int = 0
    num_tokens: int = 0


class RecentGroups:
    """Told of every group; its memory does not grow with their number."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[float, bool, RolloutGroup]] = deque(maxlen=MAX_GROUPS_PER_TICK)
        self._kept: deque[tuple[RecentGroup, RolloutGroup]] = deque()
        self._num_kept_tokens = 0
        self._next_number = 1
        self._tallies: dict[tuple[int, bool], _Tally] = {}
        self._rewards_changed = False

    @property
    def groups(self) -> list[RecentGroup]:
        """The kept ones, oldest first."""
        return [recent for recent, _ in self._kept]

    def observe(self, time_s: float, group: RolloutGroup, *, is_greedy: bool) -> None:
        """One delivered group."""
        self._arrived.append((time_s, is_greedy, group))
        for sample in group.samples:
            if sample.reward is None or not sample.weight_versions:
                continue
            version = min(span.version for span in sample.weight_versions)
            tally = self._tallies.setdefault((version, is_greedy), _Tally())
            tally.num_samples += 1
            tally.reward_sum += sample.reward
            tally.num_at_least_one += sample.reward >= 1.0
            tally.num_tokens += len(sample.token_ids)
            self._rewards_changed = True
        while len(self._tallies) > MAX_VERSIONS:
            del self._tallies[min(self._tallies)]

    def tick(self) -> list[RecentGroup]:
        """Those that are new since the last tick."""
        new = []
        for time_s, is_greedy, group in self._arrived:
            recent = _summary(self._next_number, time_s, is_greedy, group)
            self._next_number += 1
            new.append(recent)
            self._keep(recent, _cut(group))
        self._arrived.clear()
        return new

    def rewards(self) -> list[VersionReward]:
        """By version, sampled before greedy."""
        return [
            VersionReward(
                version=version,
                is_greedy=is_greedy,
                num_samples=tally.num_samples,
                mean_reward=round(tally.reward_sum / tally.num_samples, 6),
                num_at_least_one=tally.num_at_least_one,
                mean_completion_tokens=round(tally.num_tokens / tally.num_samples, 2),
            )
            for (version, is_greedy), tally in sorted(self._tallies.items())
        ]

    def take_rewards_changed(self) -> bool:
        """Whether they differ from what they were at the last call."""
        changed, self._rewards_changed = self._rewards_changed, False
        return changed

    def tokens(self, number: int, decode: Callable[[Sequence[int]], str]) -> GroupTokens:
        """A kept group token by token. Takes milliseconds; called from a worker thread.

        Raises:
            UnknownResourceError: it is not kept any more, or never was.
        """
        for recent, group in tuple(self._kept):
            if recent.number == number:
                return GroupTokens(
                    number=number,
                    group_id=group.group_id,
                    prompt=decode(group.prompt_token_ids),
                    answer=group.answer,
                    engine_id=recent.engine_id,
                    num_samples=recent.num_samples,
                    samples=[
                        _tokens(sample, head, decode)
                        for sample, head in zip(group.samples, recent.samples, strict=True)
                    ],
                )
        raise UnknownResourceError(
            f"group {number} is not kept any more: the dashboard keeps the latest {MAX_GROUPS} "
            f"groups and {MAX_KEPT_TOKENS} tokens",
            param="number",
        )

    def _keep(self, recent: RecentGroup, group: RolloutGroup) -> None:
        self._kept.append((recent, group))
        self._num_kept_tokens += _num_tokens(group)
        while len(self._kept) > 1 and (
            len(self._kept) > MAX_GROUPS or self._num_kept_tokens > MAX_KEPT_TOKENS
        ):
            self._num_kept_tokens -= _num_tokens(self._kept.popleft()[1])


def token_texts(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text each token adds. Bytes of a character that is not whole yet count to its last
    token, and joined they are the text of all (vLLM's way of detokenizing a stream)."""
    texts = []
    start = read = 0  # decoded together, since tokenizers drop a space where a text begins
    for end in range(1, len(token_ids) + 1):
        before = decode(token_ids[start:read])
        after = decode(token_ids[start:end])
        is_whole = len(after) > len(before) and not after.endswith("�")
        if is_whole or end == len(token_ids):
            texts.append(after[len(before) :])
            start, read = read, end
        else:
            texts.append("")
    return texts


def _num_tokens(group: RolloutGroup) -> int:
    return len(group.prompt_token_ids) + sum(len(sample.token_ids) for sample in group.samples)


def _cut(group: RolloutGroup) -> RolloutGroup:
    """What the token view shows of it; the rest is not held on to."""
    samples = [
        sample.model_copy(
            update={
                "token_ids": sample.token_ids[:MAX_TOKENS_PER_SAMPLE],
                "logprobs": sample.logprobs[:MAX_TOKENS_PER_SAMPLE],
                "token_origins": sample.token_origins[:MAX_TOKENS_PER_SAMPLE],
                "text": "",
                "reward_detail": {},
            }
        )
        for sample in group.samples[:MAX_SAMPLES_PER_GROUP]
    ]
    prompt = group.prompt_token_ids[:MAX_TOKENS_PER_SAMPLE]
    return group.model_copy(update={"samples": samples, "prompt_token_ids": prompt, "metadata": {}})


def _summary(number: int, time_s: float, is_greedy: bool, group: RolloutGroup) -> RecentGroup:
    rewards = [sample.reward for sample in group.samples if sample.reward is not None]
    return RecentGroup(
        number=number,
        group_id=group.group_id,
        time_s=round(time_s, 3),
        is_greedy=is_greedy,
        engine_id=group.samples[0].engine_id if group.samples else "",
        num_samples=len(group.samples),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        samples=[
            RecentSample(
                sample_index=sample.sample_index,
                preview=sample.text[:PREVIEW_CHARACTERS],
                num_tokens=len(sample.token_ids),
                finish_reason=sample.finish_reason,
                reward=sample.reward,
                reward_status=sample.reward_status,
                num_draft_tokens=sample.num_draft_tokens,
                num_accepted_tokens=sample.num_accepted_tokens,
            )
            for sample in group.samples[:MAX_SAMPLES_PER_GROUP]
        ],
    )


def _tokens(
    sample: RolloutSample, head: RecentSample, decode: Callable[[Sequence[int]], str]
) -> SampleTokens:
    return SampleTokens(
        sample_index=sample.sample_index,
        texts=token_texts(sample.token_ids, decode),
        logprobs=[round(logprob, 5) for logprob in sample.logprobs],
        token_origins=sample.token_origins,
        num_tokens=head.num_tokens,
        weight_versions=sample.weight_versions,
        num_draft_tokens=sample.num_draft_tokens,
        num_accepted_tokens=sample.num_accepted_tokens,
        reward=sample.reward,
        reward_status=sample.reward_status,
        finish_reason=sample.finish_reason,
    )
