"""Pushes and audits as Prometheus metrics and spans, whoever waits for them."""

from __future__ import annotations

import asyncio
import time
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rollout_server.collaborators import Coordinator
from rollout_server.tracing import now_ns, record_spans, span
from shared import metrics as names
from shared.errors import SlipstreamError, error_codes
from shared.logging import log_context
from shared.schemas.weights import AuditResponse, PublishRequest, PublishResponse
from shared.types import SegmentEncoding

PUSH_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
PHASES = ("verifying", "staging", "loading", "recording", "resume")
"""Keys of ``PublishResponse.phases_s``."""


class WeightMetrics:
    """Counts what the coordinator reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._pushes = Counter(
            names.PUSHES, "Weight pushes.", names.PUSHES_LABELS, registry=registry
        )
        self._refusals = Counter(
            names.PUSH_REFUSALS,
            "Refused weight pushes by error code.",
            names.PUSH_REFUSALS_LABELS,
            registry=registry,
        )
        self._duration = Histogram(
            names.PUSH_DURATION,
            "Seconds of committed weight pushes.",
            buckets=PUSH_BUCKETS_S,
            registry=registry,
        )
        self._phases = Histogram(
            names.PUSH_PHASE_DURATION,
            "Seconds of their phases.",
            names.PUSH_PHASE_LABELS,
            buckets=PUSH_BUCKETS_S,
            registry=registry,
        )
        self._pause = Histogram(
            names.PUSH_PAUSE,
            "Seconds an engine stood still for a committed push.",
            buckets=PUSH_BUCKETS_S,
            registry=registry,
        )
        self._bytes = Counter(
            names.PUSH_BYTES,
            "Bytes of committed pushes.",
            names.PUSH_BYTES_LABELS,
            registry=registry,
        )
        self._engines_removed = Counter(
            names.PUSH_ENGINES_REMOVED, "Engines that pushes took out.", registry=registry
        )
        self.in_progress = Gauge(
            names.PUSHES_IN_PROGRESS, "Pushes that run or wait.", registry=registry
        )
        self._last_commit = Gauge(
            names.LAST_COMMIT, "Unix time of the last commit.", registry=registry
        )
        self._audits = Counter(
            names.AUDITS, "Integrity audits.", names.AUDITS_LABELS, registry=registry
        )
        self._audit_duration = Histogram(
            names.AUDIT_DURATION,
            "Seconds an engine's audit took.",
            buckets=PUSH_BUCKETS_S,
            registry=registry,
        )
        self._mismatches = Counter(
            names.AUDIT_MISMATCHES, "Engines that audits took out.", registry=registry
        )
        # Every series exists from the first scrape, or rate() misses its first increment.
        for outcome in ("committed", "refused", "replayed"):
            self._pushes.labels(outcome)
        for reason in sorted(error_codes()):
            self._refusals.labels(reason)
        for phase in PHASES:
            self._phases.labels(phase)
        for outcome in ("intact", "mismatch", "incomplete"):
            self._audits.labels(outcome)
        self._bytes.labels(SegmentEncoding.FULL.value)

    def observe_commit(
        self, request: PublishRequest, response: PublishResponse, duration_s: float
    ) -> None:
        """A push that brought a new version."""
        self._pushes.labels("committed").inc()
        self._duration.observe(duration_s)
        for phase, seconds in response.phases_s.items():
            self._phases.labels(phase).observe(seconds)
        for timings in response.engines:
            self._pause.observe(timings.paused_s)
        encoding = request.manifest.encoding.value
        self._bytes.labels(encoding).inc(response.num_bytes)
        self._engines_removed.inc(len(response.engines_removed))
        self._last_commit.set(time.time())

    def observe_replay(self) -> None:
        """A push that was committed before and is answered again."""
        self._pushes.labels("replayed").inc()

    def observe_refusal(self, code: str) -> None:
        """A push that left everything as it was."""
        self._pushes.labels("refused").inc()
        self._refusals.labels(code).inc()

    def observe_audit(self, report: AuditResponse) -> None:
        """One audit of all engines."""
        outcome = "intact" if report.is_intact else "mismatch"
        if report.is_intact and report.errors:
            outcome = "incomplete"
        self._audits.labels(outcome).inc()
        self._mismatches.inc(len(report.engines_removed))
        for engine in report.engines:
            self._audit_duration.observe(engine.audit_s)


class ObservedPushes:
    """Runs pushes on the coordinator; counts them to their end, callers that hung up included."""

    def __init__(self, coordinator: Coordinator, metrics: WeightMetrics) -> None:
        self._coordinator = coordinator
        self._metrics = metrics
        self._counted_version = coordinator.committed_version
        self._tasks: set[asyncio.Task[PublishResponse]] = set()

    async def publish(self, request: PublishRequest) -> PublishResponse:
        """As ``Coordinator.publish``."""
        task = asyncio.create_task(self._run(request), name=f"observed-push-v{request.version}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Wait for what the coordinator, which is closed already, has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, request: PublishRequest) -> PublishResponse:
        metrics = self._metrics
        started_s, started_ns = monotonic(), now_ns()
        with (
            metrics.in_progress.track_inprogress(),
            log_context(weight_version=request.version),
            span("push", weight_version=request.version),
        ):
            try:
                response = await self._coordinator.publish(request)
            except SlipstreamError as exc:
                metrics.observe_refusal(exc.code)
                raise
            if response.version == self._counted_version:
                metrics.observe_replay()
                return response
            self._counted_version = response.version
            metrics.observe_commit(request, response, monotonic() - started_s)
            phases_s = {f"push.{phase}": seconds for phase, seconds in response.phases_s.items()}
            record_spans(phases_s, started_ns, weight_version=request.version)
            return response

    def _forget(self, task: asyncio.Task[PublishResponse]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: a caller that hung up does not ask for it
