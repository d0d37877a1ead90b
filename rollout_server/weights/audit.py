"""Holds every engine's live weights against the committed ones, and takes out those that differ."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.transports.snapshot_files import SnapshotFiles
from shared.errors import SlipstreamError
from shared.schemas.weights import AuditResponse, EngineAudit

logger = logging.getLogger(__name__)


async def audit_engines(
    engines: Sequence[EngineHandle], version: int, path: str, files: SnapshotFiles
) -> AuditResponse:
    """Audit all at once. Nothing may be pushed meanwhile.

    Args:
        path: the committed file, or the model directory at version 0.
        files: knows where that file is for each engine.
    """
    answers = await asyncio.gather(*(_ask(engine, path, files) for engine in engines))
    reports = [answer for answer in answers if isinstance(answer, EngineAudit)]
    removed = []
    for engine, answer in zip(engines, answers, strict=True):
        if isinstance(answer, EngineAudit) and answer.different:
            first = ", ".join(answer.different[:3])
            reason = (
                f"integrity audit: {len(answer.different)} parameters are not those of version "
                f"{version} (first {first})"
            )
            logger.error("engine %s: %s", engine.engine_id, reason)
            engine.condemn(reason)
            removed.append(engine.engine_id)
    return AuditResponse(
        version=version,
        is_intact=not removed,
        engines=reports,
        engines_removed=removed,
        errors={
            engine.engine_id: answer
            for engine, answer in zip(engines, answers, strict=True)
            if isinstance(answer, str)
        },
    )


async def _ask(engine: EngineHandle, path: str, files: SnapshotFiles) -> EngineAudit | str:
    try:
        return await engine.audit(files.path_for(engine, path))
    except SlipstreamError as exc:
        logger.warning("engine %s: could not be audited: %s", engine.engine_id, exc.message)
        return exc.message
