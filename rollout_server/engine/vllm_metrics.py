"""vLLM's own Prometheus metrics, as the text they are served in. Runs in the engine's process.

``AsyncLLM`` (vLLM 0.32.0) registers ``PrometheusStatLogger`` in the default registry of the process
it lives in. Its label ``engine`` is an index that is 0 in every process of ours: it becomes
``engine_index``, and ``engine`` is the engine's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric

VLLM_PREFIX = "vllm:"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricText:
    """One family of one engine, rendered, so that the server only joins strings."""

    name: str
    header: str
    """``# HELP`` and ``# TYPE`` lines; the same from every engine."""
    samples: str
    """Lines with values, each with the label ``engine``."""


def vllm_metrics(engine_id: str, registry: CollectorRegistry = REGISTRY) -> tuple[MetricText, ...]:
    """Every family of vLLM's in ``registry``, in order of name, without its creation times."""
    families = sorted(
        (family for family in registry.collect() if family.name.startswith(VLLM_PREFIX)),
        key=lambda family: family.name,
    )
    return tuple(_rendered(family, engine_id) for family in families)


class _Single(CollectorRegistry):
    """What ``generate_latest`` needs to render one family."""

    def __init__(self, family: Metric) -> None:
        super().__init__()
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family]


def _rendered(family: Metric, engine_id: str) -> MetricText:
    relabelled = Metric(family.name, family.documentation, family.type, family.unit)
    for sample in family.samples:
        if sample.name.endswith("_created"):
            continue
        labels = dict(sample.labels)
        if (index := labels.pop("engine", None)) is not None:
            labels["engine_index"] = index
        relabelled.add_sample(sample.name, {"engine": engine_id, **labels}, sample.value)
    lines = generate_latest(_Single(relabelled)).decode().splitlines(keepends=True)
    return MetricText(
        name=family.name,
        header="".join(line for line in lines if line.startswith("#")),
        samples="".join(line for line in lines if not line.startswith("#")),
    )


def joined(by_engine: Iterable[Sequence[MetricText]]) -> str:
    """Prometheus text of several engines: each family once, with the lines of all of them."""
    headers: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    for families in by_engine:
        for family in families:
            headers.setdefault(family.name, family.header)
            samples.setdefault(family.name, []).append(family.samples)
    return "".join(headers[name] + "".join(samples[name]) for name in sorted(headers))
