"""Spans of groups and pushes, read back from OpenTelemetry's exporter in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from rollout_server import tracing
from shared.config.observability import TracingConfig
from shared.errors import ConfigurationError, EngineError
from tests.fakes.engine import FakeEngine
from tests.fakes.service import fake_service, running
from tests.integration.test_api_metrics import COMPLETION, _Coordinator
from tests.support.scrape import PUSH, ROLLOUT

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from rollout_server.opentelemetry_tracer import OpenTelemetryTracer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Everything that is exported while the test runs."""
    memory = InMemorySpanExporter()
    config = TracingConfig(enabled=True, service_name="test")
    with tracing.installed(OpenTelemetryTracer(config, SimpleSpanProcessor(memory))):
        yield memory


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exporter.get_finished_spans()
    found = {span.name.removeprefix(tracing.PREFIX): span for span in spans}
    assert len(found) == len(spans), "a span twice"
    return found


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / tracing.NANOSECONDS


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


async def test_a_group_is_a_span_around_queue_prefill_decode_and_score(
    exporter: InMemorySpanExporter,
) -> None:
    async with running(fake_service()) as client:
        await client.post("/v1/rollouts", json={**ROLLOUT, "request_id": "r"})
    spans = by_name(exporter)
    assert set(spans) == {"group", "queue", "prefill", "decode", "score"}
    group = spans["group"]
    assert group.context is not None
    assert dict(group.attributes or {}) == {"group_id": "r/group=0", "num_samples": 2}
    assert group.resource.attributes["service.name"] == "test"
    for name in ("queue", "prefill", "decode", "score"):
        assert parent_of(spans[name]) == group.context.span_id, name
    assert seconds(spans["prefill"]) == pytest.approx(0.004)
    assert seconds(spans["decode"]) == pytest.approx(0.005)
    assert spans["prefill"].start_time == spans["queue"].end_time
    assert spans["decode"].start_time == spans["prefill"].end_time
    assert (spans["decode"].attributes or {})["engine_id"] == "engine-0"


@pytest.mark.parametrize("stream", [False, True])
async def test_completions_have_the_same_spans(
    exporter: InMemorySpanExporter, stream: bool
) -> None:
    async with running(fake_service()) as client:
        await client.post("/v1/completions", json={**COMPLETION, "stream": stream})
    spans = by_name(exporter)
    assert set(spans) == {"group", "queue", "prefill", "decode"}
    assert spans["group"].context is not None
    assert parent_of(spans["decode"]) == spans["group"].context.span_id


async def test_groups_join_the_trace_of_the_caller(exporter: InMemorySpanExporter) -> None:
    async with running(fake_service()) as client:
        await client.post("/v1/rollouts", json=ROLLOUT, headers={"traceparent": TRACEPARENT})
        traces = {
            f"{span.context.trace_id:032x}"
            for span in exporter.get_finished_spans()
            if span.context is not None
        }
        assert traces == {TRACE_ID}
        exporter.clear()
        await client.post("/v1/rollouts", json=ROLLOUT, headers={"traceparent": "nonsense"})
    assert parent_of(by_name(exporter)["group"]) is None


async def test_a_push_is_a_span_with_its_phases_one_after_the_other(
    exporter: InMemorySpanExporter,
) -> None:
    async with running(fake_service(coordinator=_Coordinator())) as client:
        await client.post("/v1/weights", json=PUSH)
        await client.post("/v1/weights", json={**PUSH, "version": 13, "base_version": 1})
    *first, refused = exporter.get_finished_spans()
    names = ["push.verifying", "push.staging", "push.loading", "push"]
    assert [span.name.removeprefix(tracing.PREFIX) for span in first] == names
    assert [seconds(span) for span in first[:3]] == pytest.approx([0.25, 0.25, 0.5])
    assert first[3].context is not None
    assert {parent_of(span) for span in first[:3]} == {first[3].context.span_id}
    assert refused.status.status_code is StatusCode.ERROR
    assert (refused.attributes or {})["error.type"] == "weight_commit_failed"


async def test_a_failed_group_says_its_code_and_nothing_of_the_request(
    exporter: InMemorySpanExporter,
) -> None:
    engine = FakeEngine("a", fail_with=EngineError("xyzzy quoted"))
    async with running(fake_service([engine])) as client:
        await client.post("/v1/rollouts", json={"prompts": [{"prompt": "xyzzy"}]})
    group = by_name(exporter)["group"]
    assert group.status.status_code is StatusCode.ERROR
    assert (group.attributes or {})["error.type"] == "engine_error"
    assert "xyzzy" not in group.to_json()


async def test_without_tracing_requests_are_served_all_the_same() -> None:
    async with running(fake_service()) as client:
        answer = await client.post(
            "/v1/rollouts", json=ROLLOUT, headers={"traceparent": TRACEPARENT}
        )
    assert answer.status_code == 200


def test_opentelemetry_is_not_imported_while_tracing_is_off() -> None:
    program = (
        "import sys; import rollout_server.api.app; from rollout_server import tracing; "
        "from shared.config.observability import TracingConfig; "
        "tracing.configure_tracing(TracingConfig()); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_without_the_package_the_error_names_the_extra_and_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "rollout_server.opentelemetry_tracer", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"slipstream-rollout\[tracing\].*tracing.enabled"):
        tracing.configure_tracing(TracingConfig(enabled=True))


def test_what_the_exporter_holds_back_is_sent_at_the_end(
    exporter: InMemorySpanExporter,
) -> None:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    memory = InMemorySpanExporter()
    batched = OpenTelemetryTracer(
        TracingConfig(enabled=True),
        BatchSpanProcessor(memory, schedule_delay_millis=3_600_000),
    )
    with tracing.installed(batched):
        with tracing.span("group"):
            pass
        assert not memory.get_finished_spans()
        tracing.close_tracing()
    assert [span.name for span in memory.get_finished_spans()] == ["slipstream.group"]


def test_a_sample_ratio_of_zero_keeps_only_traces_the_caller_keeps() -> None:
    memory = InMemorySpanExporter()
    config = TracingConfig(enabled=True, sample_ratio=0.0)
    with tracing.installed(OpenTelemetryTracer(config, SimpleSpanProcessor(memory))):
        with tracing.span("group"):
            pass
        assert not memory.get_finished_spans()
        with tracing.remote_parent(TRACEPARENT), tracing.span("group"):
            pass
        assert len(memory.get_finished_spans()) == 1
