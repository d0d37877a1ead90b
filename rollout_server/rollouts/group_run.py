"""One group from its prompt to its scores: generated, judged, put together. Keeps nothing."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rollout_server.collaborators import Scorer
from rollout_server.engine.protocol import GenerateRequest
from rollout_server.rollouts.groups import SKIPPED, build_group, score_job
from rollout_server.rollouts.ledger import Ledger
from rollout_server.rollouts.prompts import PreparedPrompt
from rollout_server.router.group_work import aborted_result
from rollout_server.router.router import RoutedResult, Router
from rollout_server.scoring.types import RewardResult, ScoreJob
from rollout_server.tracing import span
from shared.errors import ScoringError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest
from shared.types import RewardStatus

LOGGER = logging.getLogger(__name__)


class Generate(Protocol):
    """``Router.generate``, or what takes its place."""

    def __call__(self, request: GenerateRequest, *, num_wanted: int) -> Awaitable[RoutedResult]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionParts:
    """What every execution works with."""

    router: Router
    scorer: Scorer
    committed_version: Callable[[], int]
    ledger: Ledger
    on_group: Callable[[RolloutGroup, RolloutRequest], None]
    """Told of every delivered group and what asked for it (metrics, dashboard)."""
    on_group_seconds: Callable[[float], None] = lambda seconds: None
    """Told how long it took, from acceptance to its scores."""


async def run_group(
    prompt: PreparedPrompt,
    group_id: str,
    request: RolloutRequest,
    parts: ExecutionParts,
    generate: Generate,
) -> RolloutGroup:
    """
    Raises:
        EngineError, UnavailableError: as ``Router.generate``.
    """
    routed = await generate(
        GenerateRequest(
            request_id=group_id,
            prompt_token_ids=prompt.token_ids,
            n=request.n + request.over_provision,
            sampling=request.sampling,
            session_id=prompt.session_id,
        ),
        num_wanted=request.n,
    )
    jobs = {
        index: job
        for index, sample in enumerate(routed.result.samples)
        if (job := score_job(prompt, sample, request.reward)) is not None
    }
    rewards = [SKIPPED] * request.n
    with span("score", num_samples=len(jobs)):
        results = await _score(list(jobs.values()), parts.scorer, group_id) if jobs else []
    for index, result in zip(jobs, results, strict=True):
        rewards[index] = result
    return build_group(
        group_id=group_id,
        prompt=prompt,
        routed=routed,
        rewards=rewards,
        committed_version=parts.committed_version(),
        max_policy_lag=request.max_policy_lag,
    )


async def ended_before_it_began(request: GenerateRequest, *, num_wanted: int) -> RoutedResult:
    """Takes the router's place for a request that was aborted before the server was restarted."""
    result = aborted_result(replace(request, n=num_wanted))
    return RoutedResult(result=result, queue_s=0.0, num_attempts=0)


async def _score(jobs: Sequence[ScoreJob], scorer: Scorer, group_id: str) -> Sequence[RewardResult]:
    outcomes = await scorer.score_group(jobs)
    failures = [outcome for outcome in outcomes if isinstance(outcome, ScoringError)]
    if failures:
        LOGGER.error(
            "scoring for %s failed, of %d of %d samples: %s",
            *(group_id, len(failures), len(jobs), failures[0].message),
        )
    return [
        _unscored(outcome) if isinstance(outcome, ScoringError) else outcome for outcome in outcomes
    ]


def _unscored(error: ScoringError) -> RewardResult:
    """Tokens are dear: they are delivered even when the scoring pool is broken."""
    return RewardResult(
        reward=None,
        status=RewardStatus.ERROR,
        detail={"error": error.message},
        duration_s=0.0,
    )
