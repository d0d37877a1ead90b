"""``tracing.Tracer`` over the OpenTelemetry SDK. Imported only when tracing is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry import context as otel_context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rollout_server.tracing import Attributes
from shared.config.observability import TracingConfig
from shared.errors import SlipstreamError

EXPORT_TIMEOUT_S = 5


def exporting_tracer(config: TracingConfig) -> OpenTelemetryTracer:
    """Sends spans in batches, from a thread of its own, to ``tracing.endpoint``."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=config.endpoint, timeout=EXPORT_TIMEOUT_S)
    return OpenTelemetryTracer(config, BatchSpanProcessor(exporter))


class OpenTelemetryTracer:
    """A provider of its own: what else the process does with OpenTelemetry stays apart."""

    def __init__(self, config: TracingConfig, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=Resource.create({"service.name": config.service_name}),
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("slipstream", version("slipstream-rollout"))
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, attributes: Attributes) -> Iterator[None]:
        """A span around the block."""
        # The exception's text may quote a request: a span gets the error's stable code only.
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as current:
            try:
                yield
            except BaseException as exc:  # noted in the span and passed on, a cancellation too
                code = exc.code if isinstance(exc, SlipstreamError) else type(exc).__name__
                current.set_attribute("error.type", code)
                current.set_status(Status(StatusCode.ERROR, code))
                raise

    def record(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """A finished child of the current span."""
        child = self._tracer.start_span(name, start_time=start_ns, attributes=attributes)
        child.end(end_time=end_ns)

    @contextmanager
    def remote_parent(self, traceparent: str) -> Iterator[None]:
        """Spans inside the block belong to the caller's trace; an invalid header is ignored."""
        token = otel_context.attach(self._propagator.extract({"traceparent": traceparent}))
        try:
            yield
        finally:
            otel_context.detach(token)

    def close(self) -> None:
        """Send what is held back; waits for the exporter as long as it may take."""
        self._provider.shutdown()
