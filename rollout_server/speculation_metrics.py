"""What the engines report about their speculation, as Prometheus metrics. Read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from shared import metrics as names
from shared.schemas.speculation import EngineSpeculation, SpeculationPolicy
from shared.types import SpeculationMode

GAUGES: tuple[tuple[str, str, Callable[[EngineSpeculation], float | None]], ...] = (
    (names.ENGINE_SPECULATIVE_TOKENS, "Draft length now.", lambda r: r.num_speculative_tokens),
    (
        names.ENGINE_STEP_TIME_ERROR,
        "Median relative error of predicted step seconds.",
        lambda r: r.median_step_time_error,
    ),
    (
        names.ENGINE_MACHINE_FACTOR,
        "Step seconds now over those calibrated.",
        lambda r: r.machine_factor,
    ),
)
COUNTERS: tuple[tuple[str, str, Callable[[EngineSpeculation], float]], ...] = (
    (names.ENGINE_DRAFTS, "Drafts.", lambda r: r.num_drafts),
    (names.ENGINE_DRAFT_TOKENS, "Drafted tokens.", lambda r: r.num_draft_tokens),
    (names.ENGINE_ACCEPTED_TOKENS, "Accepted draft tokens.", lambda r: r.num_accepted_tokens),
    (names.ENGINE_SPECULATION_SWITCHES, "Drafting went on or off.", lambda r: r.num_switches),
    (
        names.ENGINE_PREDICTED_STEPS,
        "Steps whose seconds were predicted.",
        lambda r: r.num_predicted_steps,
    ),
    (names.ENGINE_PREDICTED_SECONDS, "Predicted seconds of steps.", lambda r: r.predicted_step_s),
    (names.ENGINE_REALISED_SECONDS, "Seconds those steps took.", lambda r: r.realised_step_s),
    (
        names.ENGINE_ACCEPTANCE_CHANGES,
        "Acceptance had changed beyond chance.",
        lambda r: r.num_acceptance_changes,
    ),
)

Labelled = Iterable[tuple[str, float]]
"""Values by the one label beside the engine."""


def speculation_metrics(
    reports: Sequence[EngineSpeculation], policy_of: Callable[[str], SpeculationPolicy]
) -> Iterator[Metric]:
    """Every family, with a series per engine."""
    for name, text, read_gauge in GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for report in reports:
            if (value := read_gauge(report)) is not None:
                gauge.add_metric([report.engine_id], value)
        yield gauge
    for name, text, read_counter in COUNTERS:
        counter = CounterMetricFamily(name, text, labels=names.ENGINE_LABELS)
        for report in reports:
            counter.add_metric([report.engine_id], read_counter(report))
        yield counter
    yield from _labelled_counters(reports)
    yield from _labelled_gauges(reports, policy_of)
    yield _kv_usage_histogram(reports)


def _labelled_counters(reports: Sequence[EngineSpeculation]) -> Iterator[Metric]:
    families: tuple[
        tuple[str, str, Sequence[str], Callable[[EngineSpeculation], Labelled]], ...
    ] = (
        (
            names.ENGINE_STEPS,
            "Steps by draft length.",
            names.ENGINE_DRAFT_LENGTH_LABELS,
            lambda r: _numbered(r.num_steps_per_k, 0),
        ),
        (
            names.ENGINE_STEP_SECONDS,
            "Seconds of steps by draft length.",
            names.ENGINE_DRAFT_LENGTH_LABELS,
            lambda r: _numbered(r.time_s_per_k, 0),
        ),
        (
            names.ENGINE_STEPS_BY_REASON,
            "Steps by the reason of their draft length.",
            names.ENGINE_STEPS_BY_REASON_LABELS,
            lambda r: [(reason.value, count) for reason, count in r.num_steps_per_reason.items()],
        ),
    )
    for name, text, labels, read in families:
        family = CounterMetricFamily(name, text, labels=labels)
        for report in reports:
            for label, value in read(report):
                family.add_metric([report.engine_id, label], value)
        yield family


def _labelled_gauges(
    reports: Sequence[EngineSpeculation], policy_of: Callable[[str], SpeculationPolicy]
) -> Iterator[Metric]:
    mode = GaugeMetricFamily(
        names.ENGINE_SPECULATION_MODE,
        "1 for the mode the engine follows.",
        labels=names.ENGINE_SPECULATION_MODE_LABELS,
    )
    acceptance = GaugeMetricFamily(
        names.ENGINE_ACCEPTANCE,
        "Share of drafts accepted at a position, given that those before it were.",
        labels=names.ENGINE_ACCEPTANCE_LABELS,
    )
    cost_model = GaugeMetricFamily(
        names.ENGINE_COST_MODEL,
        "1 for the source of the engine's cost model.",
        labels=names.ENGINE_COST_MODEL_LABELS,
    )
    for report in reports:
        engine_id = report.engine_id
        followed = policy_of(engine_id).mode
        for candidate in SpeculationMode:
            mode.add_metric([engine_id, candidate.value], float(candidate is followed))
        for position, value in _numbered(report.acceptance_per_pos, 1):
            acceptance.add_metric([engine_id, position], value)
        if report.cost_model:
            cost_model.add_metric([engine_id, report.cost_model], 1.0)
    yield from (mode, acceptance, cost_model)


def _kv_usage_histogram(reports: Sequence[EngineSpeculation]) -> Metric:
    histogram = HistogramMetricFamily(
        names.ENGINE_DECISION_KV_CACHE_USAGE,
        "Fraction of KV blocks in use when a step was decided.",
        labels=names.ENGINE_LABELS,
    )
    for report in reports:
        counts = report.num_steps_per_kv_usage
        if not counts:
            continue
        cumulative = list(accumulate(counts))
        buckets = [
            (f"{(index + 1) / len(counts):g}", float(count))
            for index, count in enumerate(cumulative)
        ]
        buckets.append(("+Inf", float(cumulative[-1])))
        histogram.add_metric([report.engine_id], buckets, report.kv_cache_usage_sum)
    return histogram


def _numbered(values: Sequence[float], first: int) -> Labelled:
    return ((str(number), value) for number, value in enumerate(values, first))
