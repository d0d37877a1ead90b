"""What the coordinator asks of one engine, each call with its time limit and its outcome as data.

``stage_on`` and ``commit_on`` raise; ``try_stage``, ``try_commit`` and ``try_discard`` report, so
that engines can be asked side by side and none of them strands the others.
"""

from __future__ import annotations

import asyncio
import logging

from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.protocol_state import (
    CommitOutcome,
    CommitReport,
    StageOutcome,
    StageReport,
)
from rollout_server.weights.snapshot import CommittedSnapshot
from shared.config.server import WeightsConfig
from shared.errors import (
    EngineDeadError,
    EngineError,
    SlipstreamError,
    WeightCommitError,
    WeightVerificationError,
)
from shared.schemas.weights import EngineCommitTimings
from shared.types import EngineState

logger = logging.getLogger(__name__)


async def stage_on(
    handle: EngineHandle, snapshot: CommittedSnapshot, config: WeightsConfig
) -> float:
    """Stage, in at most ``weights.stage_timeout_s``. Seconds, as the engine measured them.

    Raises:
        WeightVerificationError: the tensors do not fit the engine's model.
        EngineError: the engine failed, is dead or did not answer in time.
    """
    try:
        async with asyncio.timeout(config.stage_timeout_s):
            return await handle.stage(snapshot.version, snapshot.path, snapshot.manifest)
    except TimeoutError as exc:
        raise EngineError(
            f"engine {handle.engine_id} did not stage version {snapshot.version} within "
            f"weights.stage_timeout_s {config.stage_timeout_s:g}"
        ) from exc


async def commit_on(
    handle: EngineHandle, version: int, config: WeightsConfig
) -> EngineCommitTimings:
    """Commit, in at most ``weights.pause_timeout_s`` + ``weights.commit_timeout_s``.

    The engine keeps shorter limits of its own. This one is for a call that hangs all the same; it
    cancels the call, which poisons the engine like any other failure inside the commit window.

    Raises:
        WeightCommitError, EngineError: the engine is poisoned.
    """
    limit_s = config.pause_timeout_s + config.commit_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await handle.commit(version)
    except TimeoutError as exc:
        raise WeightCommitError(
            f"engine {handle.engine_id} did not commit version {version} within {limit_s:g} s "
            "(weights.pause_timeout_s + weights.commit_timeout_s)"
        ) from exc


async def try_stage(
    handle: EngineHandle, snapshot: CommittedSnapshot, config: WeightsConfig
) -> StageReport:
    """``stage_on`` with its failure as an outcome."""
    try:
        stage_s = await stage_on(handle, snapshot, config)
    except WeightVerificationError as exc:
        outcome, detail = StageOutcome.REJECTED, exc.message
    except EngineDeadError as exc:
        outcome, detail = StageOutcome.DEAD, exc.message
    except SlipstreamError as exc:
        outcome, detail = StageOutcome.FAILED, exc.message
    except Exception as exc:  # a handle's defect must not strand the other engines
        logger.exception("engine %s: unexpected error while staging", handle.engine_id)
        outcome, detail = StageOutcome.FAILED, repr(exc)
    else:
        return StageReport(engine_id=handle.engine_id, outcome=StageOutcome.STAGED, stage_s=stage_s)
    logger.warning("engine %s: staging %s: %s", handle.engine_id, outcome.value, detail)
    return StageReport(engine_id=handle.engine_id, outcome=outcome, detail=detail)


async def try_commit(
    handle: EngineHandle, version: int, stage_s: float, config: WeightsConfig
) -> CommitReport:
    """``commit_on`` with its failure as an outcome; ``stage_s`` goes into the timings."""
    try:
        timings = await commit_on(handle, version, config)
    except SlipstreamError as exc:
        detail = exc.message
    except Exception as exc:  # a handle's defect must not strand the other engines
        logger.exception("engine %s: unexpected error in the commit", handle.engine_id)
        detail = repr(exc)
    else:
        return CommitReport(
            engine_id=handle.engine_id,
            outcome=CommitOutcome.COMMITTED,
            timings=timings.model_copy(update={"stage_s": stage_s}),
        )
    logger.error("engine %s: poisoned by the commit: %s", handle.engine_id, detail)
    if handle.state is not EngineState.DEAD:
        logger.error("engine %s: failed its commit and yet is not dead", handle.engine_id)
    return CommitReport(engine_id=handle.engine_id, outcome=CommitOutcome.POISONED, detail=detail)


async def try_discard(handle: EngineHandle, version: int, config: WeightsConfig) -> None:
    """Make an engine forget a staged version; one that cannot replaces it at the next stage."""
    try:
        async with asyncio.timeout(config.stage_timeout_s):
            await handle.discard(version)
    except (SlipstreamError, TimeoutError) as exc:
        logger.warning("engine %s: discarding version %d: %s", handle.engine_id, version, exc)
