"""After a start: what the ledger has becomes running and kept requests again."""

from __future__ import annotations

import asyncio
import logging
import time

from rollout_server.collaborators import Tokenizer
from rollout_server.engine.protocol import ModelInfo
from rollout_server.rollouts.durable_requests import RestoredRequest, restored
from rollout_server.rollouts.execution import RolloutExecution
from rollout_server.rollouts.group_run import ExecutionParts, ended_before_it_began
from rollout_server.rollouts.ledger_records import (
    UNFINISHED,
    AbortAsked,
    Ended,
    Forgotten,
    KeptRequest,
    LedgerState,
    RecordedError,
)
from rollout_server.rollouts.registry import RolloutRegistry
from shared.errors import SlipstreamError

LOGGER = logging.getLogger(__name__)


async def restore_requests(
    registry: RolloutRegistry, parts: ExecutionParts, tokenizer: Tokenizer, model: ModelInfo
) -> None:
    """Take up the books, keep what had ended, and run on what had not.

    Before the first request is served, and once there are engines: what waits for one gives up
    after ``server.engine_wait_timeout_s``.
    """
    contents = parts.ledger.take_contents()
    num_pending = sum(kept.num_pending for kept in contents.unfinished)
    parts.router.accounts.restore(contents.books, num_pending)
    for kept in (*contents.ended, *contents.unfinished):
        try:
            found = await asyncio.to_thread(
                restored,
                kept,
                is_unfinished=kept.state in UNFINISHED,
                tokenizer=tokenizer,
                model=model,
                scorer=parts.scorer,
            )
        except ValueError as exc:
            LOGGER.error("rollout %s is not taken up again: %s", kept.request_id, exc)
            _give_up(kept, SlipstreamError(str(exc)), parts)
            parts.ledger.write(Forgotten(request_id=kept.request_id))
            continue
        _take_up(found, registry, parts)
    if contents.ended or contents.unfinished:
        LOGGER.info(
            "ledger: %d finished or failed requests are kept; %d go on, with %d of their %d groups",
            len(contents.ended),
            len(contents.unfinished),
            sum(len(kept.groups) for kept in contents.unfinished),
            sum(kept.num_groups for kept in contents.unfinished),
        )


def _take_up(found: RestoredRequest, registry: RolloutRegistry, parts: ExecutionParts) -> None:
    kept = found.kept
    is_aborting = kept.state is LedgerState.ABORTING
    if kept.state is LedgerState.ACCEPTED and found.is_for_nobody:
        parts.ledger.write(AbortAsked(request_id=kept.request_id))
        is_aborting = True
    execution = RolloutExecution(
        request_id=kept.request_id,
        digest=found.digest,
        request=found.request.model_copy(update={"request_id": kept.request_id}),
        prompts=found.prompts,
        groups=found.groups,
        parts=parts,
        generate=ended_before_it_began if is_aborting else None,
    )
    if kept.state in UNFINISHED and found.error is None:
        registry.resume(execution)
        return
    if kept.state in UNFINISHED:
        assert found.error is not None
        LOGGER.error(
            "rollout %s cannot go on after the restart: %s", kept.request_id, found.error.message
        )
        _give_up(kept, found.error, parts)
    execution.end_without_running(found.error)
    registry.keep(execution)


def _give_up(kept: KeptRequest, error: SlipstreamError, parts: ExecutionParts) -> None:
    parts.ledger.write(
        Ended(
            request_id=kept.request_id,
            num_failed=kept.num_pending,
            error=RecordedError(code=error.code, message=error.message, param=error.param),
            at_s=time.time(),
        )
    )
    parts.router.accounts.settle(num_failed=kept.num_pending)
