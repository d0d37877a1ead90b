"""The records that enter and leave the scoring pool."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.errors import ScoringError
from shared.schemas.base import JsonObject
from shared.schemas.rollouts import RewardSpec
from shared.types import RewardStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """One finished completion and everything its reward may look at."""

    reward: RewardSpec
    prompt: str
    completion: str
    prompt_token_ids: list[int]  # [num_prompt_tokens]
    token_ids: list[int]  # [num_completion_tokens]
    answer: str | None
    metadata: JsonObject

    def shares_question_with(self, other: ScoreJob) -> bool:
        """All but the completion is the very same, as in samples of one group."""
        return (
            self.reward is other.reward
            and self.prompt is other.prompt
            and self.answer is other.answer
            and self.metadata is other.metadata
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """What became of a job. ``reward`` is a finite number exactly when ``status`` is OK."""

    reward: float | None
    status: RewardStatus
    detail: JsonObject = field(default_factory=dict)
    """Whatever the reward function reported; ``{"error": ...}`` when it failed."""
    duration_s: float
    """In its worker, from beginning to answer; waiting for a worker, and for the samples before it
    in the same frame, is not included."""


ScoreOutcome = RewardResult | ScoringError
"""Of one sample; the error stands where the pool itself failed."""
