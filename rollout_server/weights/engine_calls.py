"""What the coordinator asks of one engine, each call with its time limit and its outcome as data.

What ends in ``_on`` raises; what begins with ``try_`` reports, so that engines can be asked side by
side and none of them strands the others.
"""

from __future__ import annotations

import asyncio
import logging

from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.protocol_state import (
    LoadOutcome,
    LoadReport,
    StageOutcome,
    StageReport,
)
from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.transports.snapshot_files import SnapshotFiles
from shared.config.weights import WeightsConfig
from shared.errors import (
    EngineDeadError,
    EngineError,
    SlipstreamError,
    WeightCommitError,
    WeightVerificationError,
)
from shared.schemas.weights import EngineCommitTimings

logger = logging.getLogger(__name__)


async def stage_on(
    handle: EngineHandle, snapshot: CommittedSnapshot, config: WeightsConfig, files: SnapshotFiles
) -> float:
    """Stage, in at most ``weights.stage_timeout_s`` from when the drafter has followed the push
    before. Seconds, as the engine measured them.

    The snapshot was brought to where the engine is (``SnapshotFiles.bring``).

    Raises:
        WeightVerificationError: the tensors do not fit the engine's model.
        EngineError: the engine failed, is dead or did not answer in time.
    """
    path = files.path_for(handle, snapshot.path)
    await handle.drafter.ended()  # within weights.rebuild_timeout_s, or the engine is dead
    try:
        async with asyncio.timeout(config.stage_timeout_s):
            return await handle.stage(snapshot.version, path, snapshot.manifest)
    except TimeoutError as exc:
        raise EngineError(
            f"engine {handle.engine_id} did not stage version {snapshot.version} within "
            f"weights.stage_timeout_s {config.stage_timeout_s:g}"
        ) from exc


async def load_on(handle: EngineHandle, version: int, config: WeightsConfig) -> None:
    """Pause and load, in at most ``weights.pause_timeout_s`` + ``weights.commit_timeout_s``.

    The engine keeps shorter limits of its own. This one is for a call that hangs all the same; it
    cancels the call, which poisons the engine like any other failure inside the commit window.

    Raises:
        WeightCommitError, EngineError: the engine is poisoned.
    """
    limit_s = config.pause_timeout_s + config.commit_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            await handle.load_weights(version)
    except TimeoutError as exc:
        raise WeightCommitError(
            f"engine {handle.engine_id} did not load version {version} within {limit_s:g} s "
            "(weights.pause_timeout_s + weights.commit_timeout_s)"
        ) from exc


async def resume_on(handle: EngineHandle, config: WeightsConfig) -> EngineCommitTimings:
    """Let a loaded engine generate again, in at most ``weights.commit_timeout_s``.

    Raises:
        WeightCommitError, EngineError: the engine is poisoned.
    """
    try:
        async with asyncio.timeout(config.commit_timeout_s):
            return await handle.resume()
    except TimeoutError as exc:
        raise WeightCommitError(
            f"engine {handle.engine_id} did not resume within weights.commit_timeout_s "
            f"{config.commit_timeout_s:g}"
        ) from exc


async def try_stage(
    handle: EngineHandle, snapshot: CommittedSnapshot, config: WeightsConfig, files: SnapshotFiles
) -> StageReport:
    """``stage_on`` with its failure as an outcome."""
    try:
        stage_s = await stage_on(handle, snapshot, config, files)
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


async def try_load(handle: EngineHandle, version: int, config: WeightsConfig) -> LoadReport:
    """``load_on`` with its failure as an outcome."""
    try:
        await load_on(handle, version, config)
    except SlipstreamError as exc:
        detail = exc.message
    except Exception as exc:  # a handle's defect must not strand the other engines
        logger.exception("engine %s: unexpected error while loading", handle.engine_id)
        detail = repr(exc)
    else:
        return LoadReport(engine_id=handle.engine_id, outcome=LoadOutcome.LOADED)
    logger.error("engine %s: poisoned by loading: %s", handle.engine_id, detail)
    handle.condemn(detail)
    return LoadReport(engine_id=handle.engine_id, outcome=LoadOutcome.POISONED, detail=detail)


async def try_resume(handle: EngineHandle, config: WeightsConfig) -> EngineCommitTimings | None:
    """``resume_on``; None for an engine that could not, which is condemned."""
    try:
        return await resume_on(handle, config)
    except SlipstreamError as exc:
        detail = exc.message
    except Exception as exc:  # a handle's defect must not strand the other engines
        logger.exception("engine %s: unexpected error while resuming", handle.engine_id)
        detail = repr(exc)
    logger.error("engine %s: could not resume: %s", handle.engine_id, detail)
    handle.condemn(detail)
    return None


async def try_go_back(
    handle: EngineHandle,
    previous: CommittedSnapshot | None,
    config: WeightsConfig,
    files: SnapshotFiles,
) -> bool:
    """Make a paused engine load the version before again; one that cannot is condemned.

    Args:
        previous: None stands for the model directory's weights.
    """
    try:
        if previous is None:
            async with asyncio.timeout(config.stage_timeout_s):
                await handle.stage_initial()
            await load_on(handle, 0, config)
        else:
            await stage_on(handle, previous, config, files)
            await load_on(handle, previous.version, config)
    except (SlipstreamError, TimeoutError) as exc:
        detail = f"cannot go back to the version before: {exc}"
    except Exception as exc:  # a handle's defect must not strand the other engines
        logger.exception("engine %s: unexpected error while going back", handle.engine_id)
        detail = repr(exc)
    else:
        return await try_resume(handle, config) is not None
    logger.error("engine %s: %s", handle.engine_id, detail)
    handle.condemn(detail)
    return False


async def try_discard(handle: EngineHandle, version: int, config: WeightsConfig) -> None:
    """Make an engine forget a staged version; one that cannot replaces it at the next stage."""
    try:
        async with asyncio.timeout(config.stage_timeout_s):
            await handle.discard(version)
    except (SlipstreamError, TimeoutError) as exc:
        logger.warning("engine %s: discarding version %d: %s", handle.engine_id, version, exc)
