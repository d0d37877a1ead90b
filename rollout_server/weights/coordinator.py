"""Runs weight pushes over all engines, one at a time, and remembers what is committed.

Called by the control plane (``publish``, ``status``) and by the engine pool
(``bring_up_to_date``). Owns the committed version and the file behind it. Pushes and joins take
turns; a push itself is in ``push``, the rules in ``protocol_state``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from pathlib import Path
from typing import Any

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.weights.audit import audit_engines
from rollout_server.weights.commit_ledger import CommitLedger
from rollout_server.weights.engine_calls import load_on, resume_on, stage_on
from rollout_server.weights.protocol_state import PushAdmission, admit_push, takes_part
from rollout_server.weights.push import Push
from rollout_server.weights.recovery import Recovered, leave_behind
from rollout_server.weights.snapshot import CommittedSnapshot
from rollout_server.weights.transports.snapshot_files import SharedFiles, SnapshotFiles
from rollout_server.weights.turns import Turns
from shared.clock import Clock
from shared.config.weights import WeightsConfig
from shared.errors import InvalidRequestError, SlipstreamError, UnavailableError
from shared.schemas.weights import (
    AuditResponse,
    EngineVersions,
    PublishRequest,
    PublishResponse,
    PushStatus,
    WeightHistoryEntry,
    WeightsResponse,
)

logger = logging.getLogger(__name__)


class WeightCoordinator:
    """One per server. Version 0 is the model directory the engines start from."""

    def __init__(
        self,
        pool: EnginePool,
        config: WeightsConfig,
        clock: Clock,
        ledger: CommitLedger,
        recovered: Recovered | None = None,
        model_path: str = "",
        files: SnapshotFiles | None = None,
    ) -> None:
        """
        Args:
            ledger: where commits are recorded; closed by ``close``.
            recovered: what an earlier server had committed.
            model_path: what engines start from: version 0.
            files: of the transport; closed by ``close``. Absent where all hosts see the same files.
        """
        recovered = recovered or Recovered()
        self._pool = pool
        self._config = config
        self._clock = clock
        self._ledger = ledger
        self._model_path = model_path
        self._files = files or SharedFiles(config.spares_dir)
        self._turns = Turns(config.lock_timeout_s)
        self._pushes: set[asyncio.Task[PublishResponse]] = set()
        self._push: Push | None = None
        self._num_commits = 0
        self._background: set[asyncio.Task[None]] = set()
        self._snapshot = recovered.snapshot
        self._last_version_used = recovered.last_version_used
        self._last_response: PublishResponse | None = None
        self._history: deque[WeightHistoryEntry] = deque(maxlen=config.history_size)
        self._up_to_date: set[str] = set()
        """Engines that may still be STARTING and yet have what is committed."""
        self._closed = False

    @property
    def committed_version(self) -> int:
        """The version new samples are generated from."""
        return 0 if self._snapshot is None else self._snapshot.version

    def snapshot(self) -> CommittedSnapshot | None:
        """The last committed push; None while the engines serve the model directory's weights."""
        return self._snapshot

    def status(self) -> WeightsResponse:
        """Body of ``GET /v1/weights``."""
        return WeightsResponse(
            committed_version=self.committed_version,
            committed_segment=self._committed_segment(),
            last_version_used=max(self._last_version_used, self.committed_version),
            push=self._push_status(),
            engines=[
                EngineVersions(
                    engine_id=engine.engine_id,
                    target_version=engine.committed_version,
                    drafter_version=engine.drafter.version,
                    requantize_s=engine.drafter.requantize_s,
                )
                for engine in self._pool.engines()
            ],
            history=list(self._history),
            receiver=self._files.receiver,
            node_receivers=self._files.node_receivers(self._pool.engines()),
        )

    def _committed_segment(self) -> str | None:
        path = None if self._snapshot is None else Path(self._snapshot.path)
        return path.name if path is not None and path.parent == self._config.directory else None

    def _push_status(self) -> PushStatus | None:
        if self._push is None:
            return None
        return PushStatus(version=self._push.version, phase=self._push.phase)

    async def publish(self, request: PublishRequest) -> PublishResponse:
        """Bring every serving engine to ``request.version``, or leave all of them where they are.

        A caller that is cancelled (its client hung up) does not stop a push: it runs to its end,
        and the same request sent again gets its answer.

        Raises:
            InvalidRequestError, ConflictError: see ``protocol_state.admit_push``; or the transport
                is not the configured one.
            UnavailableError: another push holds the lock for ``weights.lock_timeout_s``, no engine
                is serving, or the coordinator is closed.
            WeightVerificationError: the bytes are not what the manifest or the model says.
            WeightTransferError: an engine could not stage, or the file could not be adopted.
            WeightCommitError: too few engines could load it; it is rolled back everywhere.
        """
        self._check_open()
        push = asyncio.create_task(self._publish(request), name=f"push-v{request.version}")
        self._pushes.add(push)
        push.add_done_callback(self._forget_push)
        try:
            return await asyncio.shield(push)
        except asyncio.CancelledError:
            if push.cancelled():  # by close(); otherwise it is the caller that is cancelled
                self._check_open()
            raise

    async def audit(self) -> AuditResponse:
        """Compare every serving engine's live weights with the committed ones; those that differ
        are replaced.

        Raises:
            UnavailableError: a push holds the lock for ``weights.lock_timeout_s``, or the
                coordinator is closed.
        """
        self._check_open()
        async with self._turns.take("the integrity audit"):
            path = self._model_path if self._snapshot is None else self._snapshot.path
            engines = self._participants()
            return await audit_engines(engines, self.committed_version, path, self._files)

    async def bring_up_to_date(self, handle: EngineHandle) -> None:
        """Load the last committed push into an engine that is about to serve.

        The pool calls this for every new engine, before it makes it SERVING. From then on the
        engine is part of every push.

        Raises:
            UnavailableError: the lock was held for longer than a push may take, or the coordinator
                is closed.
            EngineError, WeightTransferError: the engine could not load; it must not serve.
        """
        self._check_open()
        await self._files.welcome(handle)
        async with self._turns.take(f"engine {handle.engine_id}", self._config.longest_push_s):
            snapshot = self._snapshot
            if snapshot is not None and handle.committed_version < snapshot.version:
                await self._files.bring(snapshot, [handle])
                await stage_on(handle, snapshot, self._config, self._files)
                await load_on(handle, snapshot.version, self._config)
                await resume_on(handle, self._config)
            self._up_to_date.add(handle.engine_id)

    async def close(self) -> None:
        """Cancel a running push, then remove the server's files. May be called again."""
        self._closed = True
        tasks: list[asyncio.Task[Any]] = [*self._pushes, *self._background]
        for task in tasks:
            task.cancel()
        # Bounded: a cancelled push only discards, which has weights.stage_timeout_s.
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._files.close()
        snapshot, self._snapshot = self._snapshot, None
        await asyncio.to_thread(leave_behind, snapshot, self._ledger, self._config)
        self._ledger.close()

    async def _publish(self, request: PublishRequest) -> PublishResponse:
        started_s = self._clock.monotonic_s()
        async with self._turns.take(f"version {request.version}"):
            try:
                if self._admit(request) is PushAdmission.REPLAY:
                    return self._answer_again()
                response = await self._run(request)
            except BaseException as exc:
                self._record(request.version, started_s, exc)
                raise
            self._record(request.version, started_s, None)
            return response

    def _admit(self, request: PublishRequest) -> PushAdmission:
        if request.transport is not self._config.transport:
            raise InvalidRequestError(
                f"transport {request.transport.value} is not the configured weights.transport "
                f"{self._config.transport.value}",
                param="transport",
            )
        committed = None if self._snapshot is None else self._snapshot.manifest
        return admit_push(
            self.committed_version, committed, request, last_version_used=self._last_version_used
        )

    async def _run(self, request: PublishRequest) -> PublishResponse:
        push = self._push = Push(
            request,
            self._snapshot,
            config=self._config,
            ledger=self._ledger,
            files=self._files,
            clock=self._clock,
            participants=self._participants,
            on_commit=self._committed,
        )
        response = await push.run()
        self._last_response = response
        self._num_commits += 1
        every = self._config.audit_every
        if every and self._num_commits % every == 0:
            self._background.add(audit := asyncio.create_task(self._audit_quietly()))
            audit.add_done_callback(self._background.discard)
        return response

    async def _audit_quietly(self) -> None:
        """After a push, while nobody waits: pushes meanwhile wait for the lock."""
        try:
            await self.audit()
        except SlipstreamError as exc:
            logger.warning("weights: no audit: %s", exc.message)

    def _committed(self, snapshot: CommittedSnapshot) -> None:
        self._snapshot = snapshot
        self._last_response = None  # of the version before; this one's follows when all resumed

    def _participants(self) -> list[EngineHandle]:
        engines = self._pool.engines()
        self._up_to_date &= {engine.engine_id for engine in engines}
        return [
            engine
            for engine in engines
            if takes_part(engine.state, engine.engine_id in self._up_to_date)
        ]

    def _answer_again(self) -> PublishResponse:
        """For a push that is committed already; without timings if another server ran it."""
        assert self._snapshot is not None, "only a committed push is answered again"
        return self._last_response or PublishResponse(
            version=self._snapshot.version,
            verify_s=0.0,
            total_s=0.0,
            num_bytes=sum(entry.num_bytes for entry in self._snapshot.manifest.tensors),
            segment=self._committed_segment(),
            engines=[],
        )

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("no weight pushes any more: the server is shutting down")

    def _record(self, version: int, started_s: float, error: BaseException | None) -> None:
        total_s = self._clock.monotonic_s() - started_s
        text = None if error is None else str(error) or type(error).__name__
        self._history.append(
            WeightHistoryEntry(
                version=version, committed=error is None, total_s=total_s, error=text
            )
        )
        if error is None:
            logger.info("weights: version %d committed in %.3f s", version, total_s)
        else:
            logger.warning("weights: version %d refused: %s", version, text)

    def _forget_push(self, push: asyncio.Task[PublishResponse]) -> None:
        self._pushes.discard(push)
        if not push.cancelled():
            push.exception()  # retrieved, so that asyncio does not report a caller that hung up
