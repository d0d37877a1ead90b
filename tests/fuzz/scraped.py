"""What a running server says of itself, in numbers."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.http_load import Connection, request_bytes
from shared import metrics as names


def metric_value(text: str, name: str) -> float:
    """Of a metric without labels.

    Raises:
        KeyError: the server does not export it.
    """
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                return float(sample.value)
    raise KeyError(name)


def answers_by_status(text: str) -> Counter[int]:
    """Requests that the server has answered so far; 0 where the client was gone."""
    statuses: Counter[int] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == names.HTTP_REQUESTS:
                statuses[int(sample.labels["status"])] += int(sample.value)
    return statuses


async def scrape(port: int, key: str | None = None) -> str:
    """Body of ``/metrics``."""
    async with Connection(port) as connection:
        request = request_bytes("/metrics", b"", method="GET", key=key)
        return (await connection.send(request)).body.decode()
