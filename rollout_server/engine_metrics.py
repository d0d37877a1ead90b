"""What engines report about their load, as Prometheus metrics. Read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shared import metrics as names
from shared.schemas.engines import EngineStatus
from shared.types import EngineState

GAUGES: tuple[tuple[str, str, Callable[[EngineStatus], float]], ...] = (
    (names.ENGINE_KV_CACHE_USAGE, "Fraction of KV blocks.", lambda s: s.kv_cache_usage),
    (
        names.ENGINE_KV_CACHE_CAPACITY,
        "Tokens its KV cache holds.",
        lambda s: s.num_kv_blocks * s.block_size,
    ),
    (names.ENGINE_UPTIME, "Seconds since it was created.", lambda s: s.uptime_s),
    (names.ENGINE_RUNNING, "Running requests.", lambda s: s.num_running_reqs),
    (names.ENGINE_WAITING, "Waiting requests.", lambda s: s.num_waiting_reqs),
    (names.ENGINE_RESERVED, "Samples it holds.", lambda s: s.num_reserved),
    (names.ENGINE_TARGET_VERSION, "Target's weights.", lambda s: s.target_version),
    (names.ENGINE_DRAFTER_VERSION, "Drafter's weights.", lambda s: s.drafter_version),
)
COUNTERS: tuple[tuple[str, str, Callable[[EngineStatus], float]], ...] = (
    (names.ENGINE_PREEMPTIONS, "Preempted requests.", lambda s: s.num_preemptions),
    (names.ENGINE_PROMPT_TOKENS, "Prompt tokens.", lambda s: s.num_prompt_tokens),
    (names.ENGINE_GENERATION_TOKENS, "Generated tokens.", lambda s: s.num_generation_tokens),
)


def engine_metrics(
    statuses: Sequence[EngineStatus],
    status_ages_s: Mapping[str, float],
    metrics_ages_s: Mapping[str, float],
) -> Iterator[Metric]:
    """Every family, with a series per engine of the pool."""
    state = GaugeMetricFamily(
        names.ENGINE_STATE, "1 for the engine's state.", labels=names.ENGINE_STATE_LABELS
    )
    for status in statuses:
        for candidate in EngineState:
            value = float(status.state is candidate)
            state.add_metric([status.engine_id, candidate.value], value)
    yield state
    for name, text, read in GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for status in statuses:
            gauge.add_metric([status.engine_id], read(status))
        yield gauge
    for name, text, read in COUNTERS:
        counter = CounterMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for status in statuses:
            counter.add_metric([status.engine_id], read(status))
        yield counter
    for name, text, ages_s in (
        (names.ENGINE_STATUS_AGE, "Seconds since it last answered.", status_ages_s),
        (names.ENGINE_METRICS_AGE, "Age of vLLM's metrics below.", metrics_ages_s),
    ):
        age = GaugeMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for engine_id, age_s in ages_s.items():
            age.add_metric([engine_id], age_s)
        yield age
