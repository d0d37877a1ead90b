"""The rules of a push, without any effect: what is admitted, and what engine outcomes add up to.

::

    admit_push ──> REPLAY: the committed version again, same tensors: the same answer again
        │ PROCEED
    verify, adopt
        │
    judge_stage ── an engine rejected the tensors, or did not answer: refused, old version serves
        │          a dead engine: left out
    judge_load ── enough engines loaded it, all of them paused: committed, recorded, resumed;
                  those that failed are replaced
                  too few: those that loaded it load the version before again, and resume
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.errors import (
    ConflictError,
    InvalidRequestError,
    UnavailableError,
    WeightTransferError,
    WeightVerificationError,
)
from shared.schemas.weights import PublishRequest, WeightManifest
from shared.types import CommitPolicy, EngineState


class PushAdmission(StrEnum):
    """What to do with a push that contradicts nothing."""

    PROCEED = "proceed"
    REPLAY = "replay"
    """Already committed: answer as the first time."""


class StageOutcome(StrEnum):
    """How staging ended on one engine."""

    STAGED = "staged"
    REJECTED = "rejected"
    """The tensors do not fit the model."""
    DEAD = "dead"
    FAILED = "failed"
    """No answer in time, or an error of another kind; the engine still serves the old version."""


class LoadOutcome(StrEnum):
    """How loading ended on one engine."""

    LOADED = "loaded"
    """Paused, with the new target and drafter in place."""
    POISONED = "poisoned"
    """It failed in the commit window: nothing may be served from it any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """One engine's staging."""

    engine_id: str
    outcome: StageOutcome
    detail: str = ""
    stage_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """One engine's loading."""

    engine_id: str
    outcome: LoadOutcome
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadVerdict:
    """What all engines' loading adds up to."""

    is_committed: bool
    failed: list[str]
    """Ids of the engines that are poisoned."""
    detail: str
    """Why they are, in words; empty when none is."""


def admit_push(
    committed_version: int,
    committed_manifest: WeightManifest | None,
    request: PublishRequest,
    *,
    last_version_used: int = 0,
) -> PushAdmission:
    """May this push run against what is committed now?

    Args:
        committed_version: 0 stands for the weights of the model directory.
        committed_manifest: of the last push; None while there was none.
        last_version_used: above ``committed_version`` where a restart lost committed weights; what
            was sampled under those versions must stay theirs.

    Raises:
        InvalidRequestError: the version is not above its own base.
        ConflictError: out of order, another base, or other tensors under the committed version.
    """
    if request.version <= request.base_version:
        raise InvalidRequestError(
            f"version {request.version} must be above base_version {request.base_version}",
            param="version",
        )
    if request.version == committed_version and committed_manifest is not None:
        if same_tensors(committed_manifest, request.manifest):
            return PushAdmission.REPLAY
        raise ConflictError(
            f"version {request.version} is committed already, with other tensors; "
            "publish changed weights under a new version",
            param="version",
        )
    if request.version <= committed_version:
        raise ConflictError(
            f"version {request.version} is not above the committed version {committed_version}",
            param="version",
        )
    if request.base_version != committed_version:
        raise ConflictError(
            f"base_version {request.base_version} is not the committed version "
            f"{committed_version}; GET /v1/weights tells the current one",
            param="base_version",
        )
    if request.version <= last_version_used:
        raise ConflictError(
            f"version {request.version} was used before the server lost its weights; "
            f"publish a version above {last_version_used} on base_version {committed_version}",
            param="version",
        )
    return PushAdmission.PROCEED


def same_tensors(left: WeightManifest, right: WeightManifest) -> bool:
    """Equal content; the order and the segment's name are only where it lies."""
    return sorted(left.tensors, key=lambda entry: entry.name) == sorted(
        right.tensors, key=lambda entry: entry.name
    )


def takes_part(state: EngineState, brought_up_to_date: bool) -> bool:
    """Is an engine in this state part of a push?

    One that is about to serve is: it was brought up to date before this push and would otherwise
    begin with the version before it.
    """
    if state is EngineState.STARTING:
        return brought_up_to_date
    return state in (EngineState.SERVING, EngineState.PAUSED)


def judge_stage(version: int, reports: Sequence[StageReport]) -> dict[str, float]:
    """The engines to commit on: seconds of staging by engine id.

    Raises:
        UnavailableError: no engine took part, or all of them are dead.
        WeightVerificationError: an engine rejected the tensors.
        WeightTransferError: an engine that still serves could not stage. Leaving it out would leave
            it serving the old version for good, so the push is refused whole.
    """
    for report in reports:
        if report.outcome is StageOutcome.REJECTED:
            raise WeightVerificationError(
                f"version {version} refused by engine {report.engine_id}: {report.detail}",
                param="manifest.tensors",
            )
    for report in reports:
        if report.outcome is StageOutcome.FAILED:
            raise WeightTransferError(
                f"version {version} could not be staged on engine {report.engine_id}: "
                f"{report.detail}"
            )
    staged = {
        report.engine_id: report.stage_s
        for report in reports
        if report.outcome is StageOutcome.STAGED
    }
    if not staged:
        died = ", ".join(report.engine_id for report in reports) or "none"
        raise UnavailableError(
            f"no engine is serving that could take version {version} (died while staging: {died}); "
            "publish again when GET /v1/engines shows one"
        )
    return staged


def num_engines_needed(num_engines: int, policy: CommitPolicy, quorum: float) -> int:
    """How many of the engines that loaded a push must have succeeded; at least one.

    Args:
        quorum: share of them under ``quorum``; a share that is not whole is rounded up.
    """
    if policy is CommitPolicy.ALL:
        return num_engines
    # The epsilon keeps 0.1 * 30 from becoming 4.
    return max(1, math.ceil(quorum * num_engines - 1e-9))


def judge_load(
    version: int, reports: Sequence[LoadReport], policy: CommitPolicy, quorum: float
) -> LoadVerdict:
    """Commit, or go back?

    Raises:
        UnavailableError: every engine left (was drained) between staging and loading.
    """
    if not reports:
        raise UnavailableError(
            f"every engine that had staged version {version} was drained before the commit; "
            "publish again when GET /v1/engines shows a serving one"
        )
    poisoned = [report for report in reports if report.outcome is LoadOutcome.POISONED]
    needed = num_engines_needed(len(reports), policy, quorum)
    return LoadVerdict(
        is_committed=len(reports) - len(poisoned) >= needed,
        failed=[report.engine_id for report in poisoned],
        detail="; ".join(f"{report.engine_id}: {report.detail}" for report in poisoned),
    )
