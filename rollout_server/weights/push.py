"""One weight push over all engines, from verified to committed or refused.

::

    VERIFYING ─► STAGING ─► LOADING ─► COMMITTED        recorded, then every engine resumes
        │           │          ├─────► ROLLING_BACK ─► REFUSED
        └───────────┴──────────┴─────────────────────► REFUSED

Engines load while all of them are paused, and resume only after the outcome is recorded. So no
token is ever sampled under a version that is not committed, and a push that ends in a rollback
has left no trace in any sample.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rollout_server.engine.protocol import EngineHandle
from rollout_server.weights.commit_ledger import CommitLedger, CommitRecord
from rollout_server.weights.engine_calls import (
    try_discard,
    try_go_back,
    try_load,
    try_resume,
    try_stage,
)
from rollout_server.weights.intake import take_in
from rollout_server.weights.protocol_state import judge_load, judge_stage
from rollout_server.weights.snapshot import CommittedSnapshot, remove_segment
from rollout_server.weights.transports.snapshot_files import SnapshotFiles
from shared.clock import Clock
from shared.config.weights import WeightsConfig
from shared.errors import WeightCommitError, WeightTransferError
from shared.schemas.weights import EngineCommitTimings, PublishRequest, PublishResponse
from shared.types import PUSH_TRANSITIONS, EngineState, PushPhase

logger = logging.getLogger(__name__)


class Push:
    """One push. ``run`` is called once."""

    def __init__(
        self,
        request: PublishRequest,
        previous: CommittedSnapshot | None,
        *,
        config: WeightsConfig,
        ledger: CommitLedger,
        files: SnapshotFiles,
        clock: Clock,
        participants: Callable[[], Sequence[EngineHandle]],
        on_commit: Callable[[CommittedSnapshot], None],
    ) -> None:
        """
        Args:
            previous: what is committed now; None stands for the model directory.
            files: brings snapshots to where engines are, and removes them.
            participants: the engines to push to, asked when they are about to stage.
            on_commit: called once the new version is recorded, before any engine resumes.
        """
        self._request = request
        self._previous = previous
        self._config = config
        self._ledger = ledger
        self._files = files
        self._clock = clock
        self._participants = participants
        self._on_commit = on_commit
        self._phase = PushPhase.VERIFYING
        self._phase_began_s = clock.monotonic_s()
        self._phases_s: dict[str, float] = {}

    @property
    def version(self) -> int:
        return self._request.version

    @property
    def phase(self) -> PushPhase:
        return self._phase

    async def run(self) -> PublishResponse:
        """
        Raises:
            WeightVerificationError: the bytes are not what the manifest or the model says.
            WeightTransferError: an engine could not stage; the file could not be adopted; the
                commit could not be recorded.
            WeightCommitError: too few engines could load it; it is rolled back.
            UnavailableError: no engine is serving.
        """
        started_s = self._clock.monotonic_s()
        try:
            snapshot = await self._take_in()
        except BaseException:  # also when cancelled
            self._enter(PushPhase.REFUSED)
            raise
        try:
            engines = await self._stage(snapshot)
            loaded, failed = await self._load(engines)
            await self._commit(snapshot, loaded)
        except BaseException:  # also when cancelled: no file of a refused push stays behind
            if self._phase is not PushPhase.COMMITTED:
                await self._files.remove(snapshot.path)
                self._enter(PushPhase.REFUSED)
            elif self._previous is not None:  # cancelled while it was recorded
                await self._files.remove(self._previous.path)
            raise
        try:
            timings = [t for t in await self._resume(loaded) if t is not None]
            self._end_phase("resume")
        finally:
            if self._previous is not None:
                await self._files.retire(self._previous)
        resumed = {t.engine_id for t in timings}
        failed += [e.engine_id for e in loaded if e.engine_id not in resumed]
        return PublishResponse(
            version=self.version,
            verify_s=self._phases_s["verifying"],
            total_s=self._clock.monotonic_s() - started_s,
            num_bytes=sum(entry.num_bytes for entry in snapshot.manifest.tensors),
            phases_s=self._phases_s,
            segment=Path(snapshot.path).name,
            engines=timings,
            engines_removed=failed,
        )

    async def _take_in(self) -> CommittedSnapshot:
        limit_s = self._config.stage_timeout_s
        given_up = threading.Event()
        work = asyncio.create_task(
            asyncio.to_thread(
                take_in,
                self._request,
                self._previous,
                self._config,
                self._ledger.record_path,
                given_up.is_set,
            )
        )
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(work)
        except (TimeoutError, asyncio.CancelledError) as exc:
            # The thread ends after the tensor it is at; only then is nothing left of its file.
            given_up.set()
            await asyncio.gather(work, return_exceptions=True)
            if not work.cancelled() and work.exception() is None:
                await asyncio.to_thread(remove_segment, work.result().path)
            if isinstance(exc, asyncio.CancelledError):
                raise
            raise WeightTransferError(
                f"version {self.version} was not verified within weights.stage_timeout_s "
                f"{limit_s:g}"
            ) from exc

    async def _stage(self, snapshot: CommittedSnapshot) -> list[EngineHandle]:
        """Stage on all; those that did. A refused version is forgotten everywhere."""
        self._enter(PushPhase.STAGING)
        engines = list(self._participants())
        try:
            if await self._files.bring(snapshot, engines):
                self._end_phase("spreading")
            reports = await asyncio.gather(
                *(try_stage(engine, snapshot, self._config, self._files) for engine in engines)
            )
            staged = judge_stage(self.version, reports)
        except BaseException:  # also when cancelled: nobody keeps what was staged
            await self._discard(engines)
            raise
        return [engine for engine in engines if engine.engine_id in staged]

    async def _load(self, engines: Sequence[EngineHandle]) -> tuple[list[EngineHandle], list[str]]:
        """Pause and load on all that staged; those that did, and the ids of those that failed.

        One that began to drain meanwhile ends its last samples on the version they began with.
        """
        self._enter(PushPhase.LOADING)
        engines = [engine for engine in engines if engine.state is not EngineState.DRAINING]
        reports = await asyncio.gather(
            *(try_load(engine, self.version, self._config) for engine in engines)
        )
        config = self._config
        verdict = judge_load(self.version, reports, config.commit_policy, config.commit_quorum)
        loaded = [engine for engine in engines if engine.engine_id not in verdict.failed]
        if not verdict.is_committed:
            went_back = await self._roll_back(loaded)
            raise WeightCommitError(
                f"version {self.version} is not committed: {len(verdict.failed)} of {len(engines)} "
                f"engines failed to load it ({verdict.detail}) and are replaced, under "
                f"weights.commit_policy {config.commit_policy.value}; {went_back}"
            )
        return loaded, verdict.failed

    async def _commit(self, snapshot: CommittedSnapshot, loaded: Sequence[EngineHandle]) -> None:
        """Record the new version: from here on it is what is committed, whatever happens."""
        self._end_phase(PushPhase.LOADING.value)
        record = CommitRecord(
            version=snapshot.version, path=snapshot.path, manifest=snapshot.manifest
        )
        writing = asyncio.create_task(asyncio.to_thread(self._ledger.write, record))
        was_cancelled = False
        while not writing.done():
            try:
                # Not interrupted: whether the record was written must be known.
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                was_cancelled = True
            except WeightTransferError:
                break
        try:
            writing.result()
        except WeightTransferError as exc:
            went_back = await self._roll_back(loaded)
            raise WeightTransferError(f"{exc.message}; {went_back}") from exc
        self._end_phase("recording")
        self._enter(PushPhase.COMMITTED)
        self._on_commit(snapshot)
        if was_cancelled:
            raise asyncio.CancelledError

    async def _roll_back(self, loaded: Sequence[EngineHandle]) -> str:
        """Load the version before on engines that have the new one; how that went, in words."""
        self._enter(PushPhase.ROLLING_BACK)
        went_back = await asyncio.gather(
            *(try_go_back(engine, self._previous, self._config, self._files) for engine in loaded)
        )
        names = [engine.engine_id for engine, did in zip(loaded, went_back, strict=True) if did]
        version = 0 if self._previous is None else self._previous.version
        if not names:
            return f"no engine is left that serves version {version}"
        return f"{', '.join(names)} went back to version {version}"

    async def _resume(self, loaded: Sequence[EngineHandle]) -> list[EngineCommitTimings | None]:
        return await asyncio.gather(*(try_resume(engine, self._config) for engine in loaded))

    async def _discard(self, engines: Sequence[EngineHandle]) -> None:
        await asyncio.gather(
            *(try_discard(engine, self.version, self._config) for engine in engines)
        )

    def _enter(self, phase: PushPhase) -> None:
        if phase not in PUSH_TRANSITIONS[self._phase]:
            raise ValueError(f"a push cannot go from {self._phase.value} to {phase.value}")
        self._end_phase(self._phase.value)
        logger.debug("weights: version %d is %s", self.version, phase.value)
        self._phase = phase

    def _end_phase(self, name: str) -> None:
        now_s = self._clock.monotonic_s()
        self._phases_s.setdefault(name, now_s - self._phase_began_s)
        self._phase_began_s = now_s
