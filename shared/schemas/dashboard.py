"""``/v1/events``: what the dashboard is told, first whole and then by what is new."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.schemas.base import WireModel
from shared.schemas.engines import EngineStatus
from shared.schemas.rollouts import WeightVersionSpan
from shared.schemas.speculation import EngineSpeculation, SpeculationPolicy
from shared.schemas.weights import PushStatus
from shared.types import EngineState, FinishReason, RewardStatus

KvPoint = tuple[float, float, int]
"""Unix time, fraction of the KV blocks in use, draft length (0: speculation off)."""
LoadPoint = tuple[float, float, int, int]
"""Unix time, generated tokens per second, running requests, samples waiting anywhere."""
CommitMark = tuple[float, int]
"""Unix time at which a weight version was seen committed, and the version."""


class ServerFacts(WireModel):
    """Which server this is; another ``boot_id`` means that it was restarted."""

    boot_id: str
    started_s: float
    """Unix time."""
    version: str
    model: str
    interval_s: float
    """Between two events."""


class EngineRow(WireModel):
    """One engine."""

    status: EngineStatus
    speculation: EngineSpeculation | None
    """Its latest report, without history; null before the first."""
    policy: SpeculationPolicy
    """What it follows."""
    has_own_policy: bool
    """Its policy is not the one for all."""
    tokens_per_s: float
    """Generated between its last two reports."""
    kv_points: list[KvPoint]


class DepartedEngine(WireModel):
    """An engine that is gone."""

    engine_id: str
    time_s: float
    last_state: EngineState
    """The last one it was seen in alive; ``draining`` when it was asked to go."""
    reason: str | None


class SampleCounts(WireModel):
    """Where the samples are that this server accepted since it started."""

    num_pending: int
    num_queued: int
    num_delivered: int
    num_failed: int
    num_cancelled: int


class PushRow(WireModel):
    """One weight push that has ended."""

    version: int
    committed: bool
    total_s: float
    error: str | None
    phases_s: dict[str, float] = Field(default_factory=dict)
    """Seconds of each phase; empty for refused pushes."""
    paused_s: float | None = None
    """The longest any engine stood still."""


class VersionReward(WireModel):
    """Rewards of delivered samples whose oldest token is of one weight version."""

    version: int
    is_greedy: bool
    """Sampled at temperature 0, as trainers evaluate; sampled ones are counted apart."""
    num_samples: int
    """That have a reward."""
    mean_reward: float
    num_at_least_one: int
    """With a reward of 1 or more: what the built-in rewards give to a right answer."""
    mean_completion_tokens: float


class RecentSample(WireModel):
    """The head of one sample."""

    sample_index: int
    preview: str
    num_tokens: int
    finish_reason: FinishReason
    reward: float | None
    reward_status: RewardStatus
    num_draft_tokens: int
    num_accepted_tokens: int


class RecentGroup(WireModel):
    """One delivered group; its first samples."""

    number: int
    """By which ``/v1/events/groups/{number}`` knows it."""
    group_id: str
    time_s: float
    is_greedy: bool
    engine_id: str
    num_samples: int
    mean_reward: float | None
    """Over all its samples that have one."""
    samples: list[RecentSample]


class FeedEvent(WireModel):
    """Data of a ``snapshot`` (all there is) or an ``update`` (lists hold only what is new, and
    null stands for what has not changed)."""

    time_s: float
    server: ServerFacts | None = None
    """In snapshots."""
    target_count: int
    engines: list[EngineRow]
    departed: list[DepartedEngine]
    policy: SpeculationPolicy
    max_num_speculative_tokens: int
    samples: SampleCounts
    load: list[LoadPoint]
    committed_version: int
    commits: list[CommitMark]
    push: PushStatus | None
    """The latest push, running or ended."""
    pushes: list[PushRow] | None
    """The latest ended pushes, oldest first."""
    rewards: list[VersionReward] | None
    groups: list[RecentGroup]


class SampleTokens(WireModel):
    """One sample, token by token."""

    sample_index: int
    texts: Annotated[list[str], Field(description="Of each token, at most the first ones.")]
    logprobs: list[float]
    token_origins: str
    """A letter each, as in ``RolloutSample``; empty where nobody knows."""
    num_tokens: int
    """Of the whole sample."""
    weight_versions: list[WeightVersionSpan]
    num_draft_tokens: int
    num_accepted_tokens: int
    reward: float | None
    reward_status: RewardStatus
    finish_reason: FinishReason


class GroupTokens(WireModel):
    """Answer of ``GET /v1/events/groups/{number}``."""

    number: int
    group_id: str
    prompt: str
    answer: str | None
    engine_id: str
    num_samples: int
    samples: list[SampleTokens]
