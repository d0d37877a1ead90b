"""The server's Prometheus metrics: one registry per service, names from ``shared.metrics``.

Events are counted here as they happen; what others already count (accounts, engine statuses) is
read from them at scrape time, so that nothing is booked twice. Label values come from what the
code knows (route templates, error codes, states, phases) and from the pool's engines; never from a
request, so that no client can grow the number of series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server.collaborators import Scorer
from rollout_server.engine_metrics import engine_metrics
from rollout_server.pool_metrics import pool_metrics
from rollout_server.rollouts.ledger import LedgerStats
from rollout_server.router.generation_facts import GenerationFacts
from rollout_server.router.router import Router
from rollout_server.router.strategy import READY_STATES
from rollout_server.speculation_metrics import speculation_metrics
from rollout_server.weight_metrics import WeightMetrics
from shared import metrics as names
from shared.errors import error_codes
from shared.pool_types import ScalingReason, Sickness
from shared.schemas.engines import EnginePoolStatus, EngineStatus
from shared.schemas.rollouts import RolloutGroup
from shared.schemas.speculation import EngineSpeculation, SpeculationPolicy
from shared.types import RewardStatus

LATENCY_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSources:
    """Where figures come from that are read at scrape time."""

    model_id: str
    router: Router
    scorer: Scorer
    committed_version: Callable[[], int]
    target_count: Callable[[], int]
    is_draining: Callable[[], bool]
    pools: Callable[[], Sequence[EnginePoolStatus]]
    num_sick: Callable[[], Mapping[Sickness, int]]
    num_scaled: Callable[[], Mapping[ScalingReason, int]]
    statuses: Callable[[], Sequence[EngineStatus]]
    status_ages_s: Callable[[], Mapping[str, float]]
    vllm_metrics_ages_s: Callable[[], Mapping[str, float]]
    speculation: Callable[[], Sequence[EngineSpeculation]]
    policy_of: Callable[[str], SpeculationPolicy]
    """By engine id."""
    ledger: Callable[[], LedgerStats]


class ServiceMetrics:
    """Counts events and renders everything."""

    def __init__(self, sources: MetricSources) -> None:
        # Creation times double the series, and Prometheus has no use for them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        registry = self._registry
        self.weights = WeightMetrics(registry)
        self._requests = _counter(
            registry, names.HTTP_REQUESTS, "HTTP answers.", names.HTTP_REQUESTS_LABELS
        )
        self._latency = _histogram(
            registry,
            names.HTTP_LATENCY,
            "Seconds from the request's head to the end of its answer.",
            names.HTTP_LATENCY_LABELS,
        )
        self._in_progress = Gauge(
            names.HTTP_IN_PROGRESS, "HTTP requests being served.", registry=registry
        )
        self._errors = _counter(
            registry, names.ERRORS, "Errors told to clients by code.", names.ERRORS_LABELS
        )
        self._prompt_tokens = _counter(
            registry, names.PROMPT_TOKENS, "Prompt tokens, once per group."
        )
        self._completion_tokens = _counter(
            registry, names.COMPLETION_TOKENS, "Completion tokens delivered."
        )
        self._draft_tokens = _counter(
            registry, names.DRAFT_TOKENS, "Tokens drafted for delivered rollouts."
        )
        self._accepted_tokens = _counter(
            registry, names.ACCEPTED_TOKENS, "Drafted tokens the target accepted."
        )
        self._queue = _histogram(registry, names.QUEUE_TIME, "A group's wait in the router.")
        self._first_token = _histogram(
            registry, names.TIME_TO_FIRST_TOKEN, "From acceptance to a group's first token."
        )
        self._per_token = _histogram(
            registry,
            names.TIME_PER_OUTPUT_TOKEN,
            "Mean seconds between tokens.",
            buckets=TOKEN_BUCKETS_S,
        )
        self._generate = _histogram(
            registry, names.GENERATE_TIME, "A group's seconds on its engine."
        )
        self._group = _histogram(
            registry, names.GROUP_TIME, "From a group's acceptance to its scores."
        )
        self._scoring = _histogram(
            registry, names.SCORING_TIME, "A sample's seconds in a reward worker."
        )
        self._rewards = _counter(
            registry, names.REWARDS, "Samples by reward status.", names.REWARDS_LABELS
        )
        # Every series exists from the first scrape, or rate() misses its first increment.
        for status in RewardStatus:
            self._rewards.labels(status.value)
        for code in sorted(error_codes()):
            self._errors.labels(code)
        registry.register(_SourcesCollector(sources))
        ProcessCollector(registry=registry)

    def begin_request(self) -> None:
        """An HTTP request has come; ``observe_request`` follows."""
        self._in_progress.inc()

    def observe_request(
        self, method: str, route: str, status: int, duration_s: float, codes: Sequence[str] = ()
    ) -> None:
        """The end of an HTTP request.

        Args:
            route: the template, never the path.
            codes: of the errors its client was told.
        """
        self._in_progress.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(method, route).observe(duration_s)
        for code in codes:
            self._errors.labels(code).inc()

    def observe_generation(self, facts: GenerationFacts) -> None:
        """One group that an engine finished, of a rollout or a completion."""
        self._queue.observe(facts.queue_s)
        self._generate.observe(facts.generate_s)
        if facts.first_token_s is not None:
            self._first_token.observe(facts.first_token_s)
        if facts.per_output_token_s is not None:
            self._per_token.observe(facts.per_output_token_s)

    def observe_group(self, group: RolloutGroup) -> None:
        """One delivered group."""
        self.observe_tokens(
            len(group.prompt_token_ids), sum(len(sample.token_ids) for sample in group.samples)
        )
        # Counted first: a group's samples mostly ended alike, and every call takes a lock.
        self._draft_tokens.inc(sum(sample.num_draft_tokens for sample in group.samples))
        self._accepted_tokens.inc(sum(sample.num_accepted_tokens for sample in group.samples))
        counts: dict[RewardStatus, int] = {}
        for sample in group.samples:
            counts[sample.reward_status] = counts.get(sample.reward_status, 0) + 1
        for status, count in counts.items():
            self._rewards.labels(status.value).inc(count)
        for sample in group.samples:
            if sample.reward_status is not RewardStatus.SKIPPED:
                self._scoring.observe(sample.timings.score_s)

    def observe_group_seconds(self, duration_s: float) -> None:
        """How long a delivered group took, from acceptance to its scores."""
        self._group.observe(duration_s)

    def observe_tokens(self, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        """Tokens of delivered samples."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._completion_tokens.inc(num_completion_tokens)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)


class _SourcesCollector(Collector):
    def __init__(self, sources: MetricSources) -> None:
        self._sources = sources

    def describe(self) -> list[Metric]:
        return []  # keeps registration from collecting before the service is whole

    def collect(self) -> Iterator[Metric]:
        sources = self._sources
        router = sources.router
        accounts = router.accounts
        ledger = sources.ledger()
        statuses = sources.statuses()
        num_ready = sum(status.state in READY_STATES for status in statuses)
        info = GaugeMetricFamily(names.BUILD_INFO, "Always 1.", labels=names.BUILD_INFO_LABELS)
        info.add_metric([version("slipstream-rollout"), sources.model_id], 1)
        yield info
        for name, text, value in (
            (names.PENDING_SAMPLES, "Samples accepted and not ended.", accounts.num_pending),
            (
                names.SAMPLES_UNACCOUNTED,
                "Accepted, not ended, not pending.",
                accounts.num_unaccounted,
            ),
            (names.PENDING_SAMPLES_LIMIT, "Most of those.", accounts.max_pending_samples),
            (names.QUEUED_SAMPLES, "Samples waiting for an engine.", router.num_queued_samples),
            (names.LONGEST_WAIT, "Wait of the first of them.", router.longest_wait_s),
            (names.SCORING_QUEUED, "Samples waiting for a worker.", sources.scorer.num_queued),
            (names.LEDGER_BYTES, "The ledger on disk.", ledger.num_bytes),
            (names.LEDGER_UNWRITTEN, "Changes that wait for the disk.", ledger.num_unwritten),
            (names.COMMITTED_VERSION, "Committed weights.", sources.committed_version()),
            (names.READY_ENGINES, "Engines that take requests.", num_ready),
            (names.TARGET_ENGINES, "Engines asked for.", sources.target_count()),
            (names.DRAINING, "1 while it refuses new requests.", sources.is_draining()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        num_restarts = sources.scorer.num_worker_restarts
        for name, text, value in (
            (names.SAMPLES_ACCEPTED, "Samples accepted.", accounts.num_accepted),
            (names.SAMPLES_DELIVERED, "Samples delivered.", accounts.num_delivered),
            (names.SAMPLES_FAILED, "Samples lost to an error.", accounts.num_failed),
            (names.SAMPLES_CANCELLED, "Samples aborted.", accounts.num_cancelled),
            (names.LEDGER_COMMITS, "Transactions of the ledger.", ledger.num_commits),
            (names.LEDGER_COMMIT_SECONDS, "Seconds they took.", ledger.commit_s),
            (names.LEDGER_WRITE_FAILURES, "Failed transactions.", ledger.num_write_failures),
            (names.GENERATE_RETRIES, "Groups whose engine died.", router.num_retries),
            (names.KEPT_TOKENS, "Tokens kept from dead engines.", router.num_kept_tokens),
            (
                names.STRAGGLERS_HANDED_OVER,
                "Late samples that changed engines.",
                router.stragglers.num_handed_over,
            ),
            (
                names.STRAGGLER_RECOMPUTED,
                "Tokens prefilled for those.",
                router.stragglers.num_recomputed_tokens,
            ),
            (names.CIRCUIT_OPENINGS, "Engines that failed.", router.circuits.num_openings),
            (names.SCORING_RESTARTS, "Reward workers replaced.", num_restarts),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield from engine_metrics(statuses, sources.status_ages_s(), sources.vllm_metrics_ages_s())
        yield from pool_metrics(sources.pools(), statuses, sources.num_sick(), sources.num_scaled())
        yield from speculation_metrics(sources.speculation(), sources.policy_of)


def _counter(
    registry: CollectorRegistry, name: str, text: str, labels: Sequence[str] = ()
) -> Counter:
    return Counter(name, text, labels, registry=registry)


def _histogram(
    registry: CollectorRegistry,
    name: str,
    text: str,
    labels: Sequence[str] = (),
    buckets: Sequence[float] = LATENCY_BUCKETS_S,
) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, registry=registry)
