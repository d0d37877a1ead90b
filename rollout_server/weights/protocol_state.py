"""The rules of a push, without any effect: what is admitted, and what engine outcomes add up to.

::

    admit_push ──> REPLAY: the committed version again, same tensors: the same answer again
        │ PROCEED
    verify, adopt
        │
    judge_stage ── an engine rejected the tensors, or did not answer: refused, old version serves
        │          a dead engine: left out
    judge_commit ─ at least one engine committed: committed; those that failed are removed
                   none did: not committed, and there is no engine left
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.errors import (
    ConflictError,
    InvalidRequestError,
    UnavailableError,
    WeightCommitError,
    WeightTransferError,
    WeightVerificationError,
)
from shared.schemas.weights import EngineCommitTimings, PublishRequest, WeightManifest
from shared.types import EngineState


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


class CommitOutcome(StrEnum):
    """How the commit ended on one engine."""

    COMMITTED = "committed"
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
class CommitReport:
    """One engine's commit."""

    engine_id: str
    outcome: CommitOutcome
    detail: str = ""
    timings: EngineCommitTimings | None = None
    """Present exactly when the outcome is COMMITTED."""


def admit_push(
    committed_version: int, committed_manifest: WeightManifest | None, request: PublishRequest
) -> PushAdmission:
    """May this push run against what is committed now?

    Args:
        committed_version: 0 stands for the weights of the model directory.
        committed_manifest: of the last push; None while there was none.

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


def judge_commit(version: int, reports: Sequence[CommitReport]) -> list[str]:
    """Ids of the engines to report as removed, after at least one has committed.

    Raises:
        UnavailableError: every engine left (was drained) between staging and committing.
        WeightCommitError: every engine failed; the version is not committed.
    """
    if not reports:
        raise UnavailableError(
            f"every engine that had staged version {version} was drained before the commit; "
            "publish again when GET /v1/engines shows a serving one"
        )
    poisoned = [report for report in reports if report.outcome is CommitOutcome.POISONED]
    if len(poisoned) == len(reports):
        causes = "; ".join(f"{report.engine_id}: {report.detail}" for report in poisoned)
        raise WeightCommitError(
            f"version {version} failed on every engine and is not committed ({causes})"
        )
    return [report.engine_id for report in poisoned]
