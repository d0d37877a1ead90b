"""What became of engines and pools, as Prometheus metrics. Read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shared import metrics as names
from shared.pool_types import CircuitState, EngineHealth, RestartState, ScalingReason, Sickness
from shared.schemas.engines import EnginePoolStatus, EngineStatus

GAUGES: tuple[tuple[str, str, Callable[[EnginePoolStatus], float]], ...] = (
    (names.POOL_TARGET, "Engines asked for.", lambda p: p.target_count),
    (names.POOL_SERVING, "Engines that serve.", lambda p: p.num_serving),
    (
        names.POOL_QUARANTINED,
        "1 while it replaces no engine.",
        lambda p: p.restart_state is RestartState.QUARANTINED,
    ),
)


def pool_metrics(
    pools: Sequence[EnginePoolStatus],
    statuses: Sequence[EngineStatus],
    num_sick: Mapping[Sickness, int],
    num_scaled: Mapping[ScalingReason, int],
) -> Iterator[Metric]:
    """Every family."""
    for name, text, read in GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=names.POOL_LABELS)
        for pool in pools:
            gauge.add_metric([pool.name], float(read(pool)))
        yield gauge
    losses = CounterMetricFamily(names.POOL_LOSSES, "Engines lost.", labels=names.POOL_LABELS)
    for pool in pools:
        losses.add_metric([pool.name], pool.num_losses)
    yield losses
    health = GaugeMetricFamily(
        names.ENGINE_HEALTH, "1 for the engine's health.", labels=names.ENGINE_HEALTH_LABELS
    )
    for status in statuses:
        for candidate in EngineHealth:
            value = float(status.health is candidate)
            health.add_metric([status.engine_id, candidate.value], value)
    yield health
    circuits = GaugeMetricFamily(
        names.ENGINE_CIRCUIT, "1 for the circuit's state.", labels=names.ENGINE_CIRCUIT_LABELS
    )
    for status in statuses:
        for state in CircuitState:
            circuits.add_metric([status.engine_id, state.value], float(status.circuit is state))
    yield circuits
    sick = CounterMetricFamily(
        names.ENGINES_GIVEN_UP, "Engines given up.", labels=names.ENGINES_GIVEN_UP_LABELS
    )
    for sickness in Sickness:
        sick.add_metric([sickness.value], num_sick.get(sickness, 0))
    yield sick
    scaled = CounterMetricFamily(
        names.AUTOSCALING_CHANGES, "Changes of the target.", labels=names.AUTOSCALING_LABELS
    )
    for reason in ScalingReason:
        scaled.add_metric([reason.value], num_scaled.get(reason, 0))
    yield scaled
