"""The server's Prometheus metrics: one registry per service, names from ``shared.metrics``.

Events are counted here as they happen; what others already count (accounts, engine statuses) is
read from them at scrape time, so that nothing is booked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server.router.accounting import SampleAccounts
from rollout_server.router.strategy import READY_STATES
from rollout_server.speculation_metrics import speculation_metrics
from shared import metrics as names
from shared.schemas.engines import EngineStatus
from shared.schemas.rollouts import RolloutGroup
from shared.schemas.speculation import EngineSpeculation, SpeculationPolicy
from shared.types import EngineState, RewardStatus

LATENCY_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
PUSH_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSources:
    """Where figures come from that are read at scrape time."""

    accounts: SampleAccounts
    num_queued_samples: Callable[[], int]
    num_retries: Callable[[], int]
    committed_version: Callable[[], int]
    target_count: Callable[[], int]
    statuses: Callable[[], Sequence[EngineStatus]]
    speculation: Callable[[], Sequence[EngineSpeculation]]
    policy_of: Callable[[str], SpeculationPolicy]
    """By engine id."""


class ServiceMetrics:
    """Counts events and renders everything."""

    def __init__(self, sources: MetricSources) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            names.HTTP_REQUESTS, "HTTP answers.", names.HTTP_REQUESTS_LABELS, registry=registry
        )
        self._latency = Histogram(
            names.HTTP_LATENCY,
            "Seconds from the request's head to the end of its answer.",
            names.HTTP_LATENCY_LABELS,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            names.PROMPT_TOKENS, "Prompt tokens, once per group.", registry=registry
        )
        self._completion_tokens = Counter(
            names.COMPLETION_TOKENS, "Completion tokens delivered.", registry=registry
        )
        self._draft_tokens = Counter(
            names.DRAFT_TOKENS, "Tokens drafted for delivered rollouts.", registry=registry
        )
        self._accepted_tokens = Counter(
            names.ACCEPTED_TOKENS, "Drafted tokens the target accepted.", registry=registry
        )
        self._rewards = Counter(
            names.REWARDS, "Samples by reward status.", names.REWARDS_LABELS, registry=registry
        )
        self._pushes = Counter(
            names.PUSHES, "Weight pushes.", names.PUSHES_LABELS, registry=registry
        )
        self._push_duration = Histogram(
            names.PUSH_DURATION,
            "Seconds of committed weight pushes.",
            buckets=PUSH_BUCKETS_S,
            registry=registry,
        )
        # Every series exists from the first scrape, or rate() misses its first increment.
        for status in RewardStatus:
            self._rewards.labels(status.value)
        for outcome in ("committed", "refused"):
            self._pushes.labels(outcome)
        registry.register(_SourcesCollector(sources))

    def observe_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        """One HTTP answer. ``route`` is the template, never the path (bounded label values)."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(method, route).observe(duration_s)

    def observe_group(self, group: RolloutGroup) -> None:
        """One delivered group."""
        self.observe_tokens(
            len(group.prompt_token_ids), sum(len(sample.token_ids) for sample in group.samples)
        )
        for sample in group.samples:
            self._draft_tokens.inc(sample.num_draft_tokens)
            self._accepted_tokens.inc(sample.num_accepted_tokens)
            self._rewards.labels(sample.reward_status.value).inc()

    def observe_tokens(self, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        """Tokens of delivered samples."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._completion_tokens.inc(num_completion_tokens)

    def observe_push(self, duration_s: float | None) -> None:
        """One weight push: its seconds when it was committed, None when it was refused."""
        self._pushes.labels("refused" if duration_s is None else "committed").inc()
        if duration_s is not None:
            self._push_duration.observe(duration_s)

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
        accounts = sources.accounts
        statuses = sources.statuses()
        num_ready = sum(status.state in READY_STATES for status in statuses)
        for name, text, value in (
            (names.PENDING_SAMPLES, "Samples accepted and not ended.", accounts.num_pending),
            (names.QUEUED_SAMPLES, "Samples waiting for an engine.", sources.num_queued_samples()),
            (names.COMMITTED_VERSION, "Committed weights.", sources.committed_version()),
            (names.READY_ENGINES, "Engines that take requests.", num_ready),
            (names.TARGET_ENGINES, "Engines asked for.", sources.target_count()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            (names.SAMPLES_ACCEPTED, "Samples accepted.", accounts.num_accepted),
            (names.SAMPLES_DELIVERED, "Samples delivered.", accounts.num_delivered),
            (names.SAMPLES_FAILED, "Samples lost to an error.", accounts.num_failed),
            (names.SAMPLES_CANCELLED, "Samples aborted.", accounts.num_cancelled),
            (names.GENERATE_RETRIES, "Groups generated afresh.", sources.num_retries()),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield from _engine_metrics(statuses)
        yield from speculation_metrics(sources.speculation(), sources.policy_of)


def _engine_metrics(statuses: Sequence[EngineStatus]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        names.ENGINE_STATE, "1 for the engine's state.", labels=names.ENGINE_STATE_LABELS
    )
    for status in statuses:
        for candidate in EngineState:
            value = float(status.state is candidate)
            state.add_metric([status.engine_id, candidate.value], value)
    yield state
    gauges: tuple[tuple[str, str, Callable[[EngineStatus], float]], ...] = (
        (names.ENGINE_KV_CACHE_USAGE, "Fraction of KV blocks.", lambda s: s.kv_cache_usage),
        (names.ENGINE_RUNNING, "Running requests.", lambda s: s.num_running_reqs),
        (names.ENGINE_WAITING, "Waiting requests.", lambda s: s.num_waiting_reqs),
        (names.ENGINE_RESERVED, "Samples it holds.", lambda s: s.num_reserved),
        (names.ENGINE_TARGET_VERSION, "Target's weights.", lambda s: s.target_version),
        (names.ENGINE_DRAFTER_VERSION, "Drafter's weights.", lambda s: s.drafter_version),
    )
    for name, text, read in gauges:
        gauge = GaugeMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for status in statuses:
            gauge.add_metric([status.engine_id], read(status))
        yield gauge
    counters: tuple[tuple[str, str, Callable[[EngineStatus], float]], ...] = (
        (names.ENGINE_PREEMPTIONS, "Preempted requests.", lambda s: s.num_preemptions),
        (names.ENGINE_GENERATION_TOKENS, "Generated tokens.", lambda s: s.num_generation_tokens),
    )
    for name, text, read in counters:
        counter = CounterMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for status in statuses:
            counter.add_metric([status.engine_id], read(status))
        yield counter
