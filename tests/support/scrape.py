"""What a server with fake engines exports once it has done a bit of everything."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running, until

MANIFEST = {
    "segment": "slipstream-1.safetensors",
    "tensors": [{"name": "w", "dtype": "F32", "shape": [1], "num_bytes": 4, "digest": "00"}],
}
PUSH = {"version": 1, "base_version": 0, "manifest": MANIFEST}
ROLLOUT = {"prompts": [{"prompt": "a"}], "n": 2, "reward": {"name": "length"}}
VLLM_NAME = re.compile(r'"(vllm:\w+)"')
SAMPLE_NAME = re.compile(r"^([a-zA-Z_:][\w:]*)[{ ]", re.MULTILINE)


def vllm_like_registry() -> CollectorRegistry:
    """A few metrics as vLLM registers them: its label ``engine`` is an index."""
    registry = CollectorRegistry()
    labels = ("model_name", "engine")
    Gauge("vllm:num_requests_running", "Running.", labels, registry=registry).labels("m", "0").set(
        3
    )
    Counter("vllm:prompt_tokens", "Prompt.", labels, registry=registry).labels("m", "0").inc(7)
    Histogram(
        "vllm:time_to_first_token_seconds", "TTFT.", labels, buckets=(0.1, 1), registry=registry
    ).labels("m", "0").observe(0.5)
    Counter("python_gc", "Of the process, not of vLLM.", registry=registry).inc()
    return registry


async def scraped() -> str:
    """Body of ``/metrics`` after a rollout, a push, an audit and an error."""
    service = fake_service([FakeEngine("engine-0", vllm_registry=vllm_like_registry())])
    async with running(service) as client:
        await until(service.status_poller.speculation, "the first poll")
        await client.post("/v1/rollouts", json=ROLLOUT)
        await client.post("/v1/weights", json=PUSH)
        await client.post("/v1/weights/audit", json={})
        await client.get("/nope")
        return (await client.get("/metrics")).text


def sample_names(text: str) -> set[str]:
    """Names of the series in a scrape, ``_bucket`` and the like included."""
    return set(SAMPLE_NAME.findall(text))


def family_names(text: str) -> set[str]:
    """Names as documents give them: counters with ``_total``, histograms without a suffix."""
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
    }


def vllm_sample_names() -> set[str] | None:
    """Series the installed vLLM can export, read from its source; None where there is no vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0]) / "v1"
    found = set()
    for path in (root / "metrics" / "loggers.py", root / "spec_decode" / "metrics.py"):
        found |= set(VLLM_NAME.findall(path.read_text(encoding="utf-8")))
    return {
        name + suffix for name in found for suffix in ("", "_total", "_bucket", "_sum", "_count")
    }
