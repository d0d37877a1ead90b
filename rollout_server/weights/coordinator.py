"""Runs weight pushes over all engines: verify, stage everywhere, commit everywhere.

Called by the control plane (``publish``, ``status``) and by the engine pool
(``bring_up_to_date``). Owns the committed version and the file behind it. One lock makes pushes and
joins strictly one after the other; the rules themselves are in ``protocol_state``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from rollout_server.engine.protocol import EngineHandle, EnginePool
from rollout_server.weights.engine_calls import (
    commit_on,
    stage_on,
    try_commit,
    try_discard,
    try_stage,
)
from rollout_server.weights.protocol_state import (
    PushAdmission,
    admit_push,
    judge_commit,
    judge_stage,
    takes_part,
)
from rollout_server.weights.snapshot import CommittedSnapshot, adopt_segment, remove_segment
from rollout_server.weights.verify import verify_segment
from shared.clock import Clock
from shared.config.server import WeightsConfig
from shared.errors import InvalidRequestError, UnavailableError, WeightTransferError
from shared.schemas.weights import (
    EngineCommitTimings,
    EngineVersions,
    PublishRequest,
    PublishResponse,
    WeightHistoryEntry,
    WeightsResponse,
)
from shared.types import EngineState

logger = logging.getLogger(__name__)


class WeightCoordinator:
    """One per server. Version 0 is the model directory the engines start from."""

    def __init__(self, pool: EnginePool, config: WeightsConfig, clock: Clock) -> None:
        self._pool = pool
        self._config = config
        self._clock = clock
        self._directory = Path(config.shared_memory_dir)
        self._lock = asyncio.Lock()
        self._pushes: set[asyncio.Task[PublishResponse]] = set()
        self._snapshot: CommittedSnapshot | None = None
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
            engines=[
                # A commit sets both versions or poisons the engine, so they cannot differ here.
                EngineVersions(
                    engine_id=engine.engine_id,
                    target_version=engine.committed_version,
                    drafter_version=engine.committed_version,
                )
                for engine in self._pool.engines()
            ],
            history=list(self._history),
        )

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
            WeightCommitError: every engine failed in the commit window.
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

    async def bring_up_to_date(self, handle: EngineHandle) -> None:
        """Load the last committed push into an engine that is about to serve.

        The pool calls this for every new engine, before it makes it SERVING. From then on the
        engine is part of every push.

        Raises:
            UnavailableError: a push holds the lock for ``weights.lock_timeout_s``, or the
                coordinator is closed.
            EngineError, WeightTransferError: the engine could not load; it must not serve.
        """
        self._check_open()
        async with self._exclusively(f"engine {handle.engine_id}"):
            snapshot = self._snapshot
            if snapshot is not None and handle.committed_version < snapshot.version:
                await stage_on(handle, snapshot, self._config)
                await commit_on(handle, snapshot.version, self._config)
            self._up_to_date.add(handle.engine_id)

    async def close(self) -> None:
        """Cancel a running push, then remove the server's files. May be called again."""
        self._closed = True
        pushes = list(self._pushes)
        for push in pushes:
            push.cancel()
        # Bounded: a cancelled push only discards, which has weights.stage_timeout_s.
        await asyncio.gather(*pushes, return_exceptions=True)
        if self._snapshot is not None:
            await asyncio.to_thread(remove_segment, self._snapshot.path)

    async def _publish(self, request: PublishRequest) -> PublishResponse:
        started_s = self._clock.monotonic_s()
        async with self._exclusively(f"version {request.version}"):
            try:
                if self._admit(request) is PushAdmission.REPLAY:
                    assert self._last_response is not None, "a committed push has a response"
                    return self._last_response
                response = await self._run(request, started_s)
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
        return admit_push(self.committed_version, committed, request)

    async def _run(self, request: PublishRequest, started_s: float) -> PublishResponse:
        """Everything of a push that takes time; on any failure no file of it stays behind."""
        manifest = request.manifest
        # Adopted before it is verified: what engines load is then the very file that was checked.
        path = adopt_segment(self._directory, manifest.segment, request.version)
        snapshot = CommittedSnapshot(version=request.version, path=str(path), manifest=manifest)
        try:
            verify_s = await self._verify(snapshot)
            engines = self._participants()
            stage_times_s = await self._stage(snapshot, engines)
            timings, removed = await self._commit(request.version, engines, stage_times_s)
        except BaseException:
            await asyncio.to_thread(remove_segment, path)
            raise
        previous, self._snapshot = self._snapshot, snapshot
        self._last_response = PublishResponse(
            version=request.version,
            verify_s=verify_s,
            total_s=self._clock.monotonic_s() - started_s,
            num_bytes=sum(entry.num_bytes for entry in manifest.tensors),
            engines=timings,
            engines_removed=removed,
        )
        if previous is not None:
            await asyncio.to_thread(remove_segment, previous.path)
        return self._last_response

    async def _verify(self, snapshot: CommittedSnapshot) -> float:
        """Seconds it took."""
        started_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(self._config.stage_timeout_s):
                await asyncio.to_thread(verify_segment, snapshot.path, snapshot.manifest)
        except TimeoutError as exc:
            raise WeightTransferError(
                f"version {snapshot.version} was not verified within weights.stage_timeout_s "
                f"{self._config.stage_timeout_s:g}"
            ) from exc
        return self._clock.monotonic_s() - started_s

    def _participants(self) -> list[EngineHandle]:
        engines = self._pool.engines()
        self._up_to_date &= {engine.engine_id for engine in engines}
        return [
            engine
            for engine in engines
            if takes_part(engine.state, engine.engine_id in self._up_to_date)
        ]

    async def _stage(
        self, snapshot: CommittedSnapshot, engines: Sequence[EngineHandle]
    ) -> dict[str, float]:
        """Stage on all; seconds by engine id. A refused version is forgotten everywhere."""
        try:
            reports = await asyncio.gather(
                *(try_stage(engine, snapshot, self._config) for engine in engines)
            )
            return judge_stage(snapshot.version, reports)
        except BaseException:
            await asyncio.gather(
                *(try_discard(engine, snapshot.version, self._config) for engine in engines)
            )
            raise

    async def _commit(
        self, version: int, engines: Sequence[EngineHandle], stage_times_s: dict[str, float]
    ) -> tuple[list[EngineCommitTimings], list[str]]:
        """Commit on all that staged; their timings, and the ids of those that failed.

        One that began to drain meanwhile ends its last samples on the version they began with.
        """
        reports = await asyncio.gather(
            *(
                try_commit(engine, version, stage_times_s[engine.engine_id], self._config)
                for engine in engines
                if engine.engine_id in stage_times_s and engine.state is not EngineState.DRAINING
            )
        )
        removed = judge_commit(version, reports)
        return [report.timings for report in reports if report.timings is not None], removed

    @contextlib.asynccontextmanager
    async def _exclusively(self, who: str) -> AsyncIterator[None]:
        limit_s = self._config.lock_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._lock.acquire()
        except TimeoutError as exc:
            raise UnavailableError(
                f"{who} waited for another weight push for weights.lock_timeout_s {limit_s:g}"
            ) from exc
        try:
            yield
        finally:
            self._lock.release()

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
