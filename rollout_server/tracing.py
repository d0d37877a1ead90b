"""Spans of groups and pushes for OpenTelemetry, when ``tracing.enabled``; else nothing at all.

::

    slipstream.group                         one prompt, from acceptance to its delivery
    ├── slipstream.queue                     waiting in the router
    ├── slipstream.prefill                   in the engine (its queue included), to the first token
    ├── slipstream.decode                    to the last token of its last sample
    └── slipstream.score                     all samples
    slipstream.push                          one weight push
    └── slipstream.push.<phase>              verifying, staging, loading, recording, resume

A ``traceparent`` header of the HTTP request makes its groups children of the caller's span. Like
logging, tracing is set up once per process; OpenTelemetry is imported only then. Spans carry ids
and counts, never text or tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from shared.config.observability import TracingConfig
from shared.errors import ConfigurationError

Attributes = Mapping[str, str | int | float | bool]
NANOSECONDS = 1_000_000_000
PREFIX = "slipstream."


class Tracer(Protocol):
    """What ``span`` and ``record_spans`` write to."""

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[None]: ...

    def record(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None: ...

    def remote_parent(self, traceparent: str) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


_tracer: Tracer | None = None


def install_tracer(tracer: Tracer | None) -> None:
    """Use ``tracer`` in this process from now on; None switches tracing off."""
    global _tracer
    _tracer = tracer


def configure_tracing(config: TracingConfig) -> None:
    """Set up what the configuration asks for. Nothing is imported when it is off.

    Raises:
        ConfigurationError: it is on, and OpenTelemetry is not installed.
    """
    if not config.enabled:
        return
    try:
        from rollout_server.opentelemetry_tracer import exporting_tracer
    except ImportError as exc:
        raise ConfigurationError(
            f"tracing.enabled needs OpenTelemetry ({exc}): pip install "
            "'slipstream-rollout[tracing]', or set tracing.enabled false",
            param="tracing.enabled",
        ) from exc
    install_tracer(exporting_tracer(config))


def close_tracing() -> None:
    """Send what is still held back, and switch tracing off."""
    if _tracer is not None:
        _tracer.close()
    install_tracer(None)


def span(name: str, **attributes: Any) -> AbstractContextManager[None]:
    """A span around the block; its error when the block raises."""
    return nullcontext() if _tracer is None else _tracer.span(PREFIX + name, attributes)


def record_spans(durations_s: Mapping[str, float], start_ns: int, **attributes: Any) -> None:
    """Children of the span that is open here: one after the other, measured already."""
    if _tracer is None:
        return
    for name, duration_s in durations_s.items():
        end_ns = start_ns + int(duration_s * NANOSECONDS)
        _tracer.record(PREFIX + name, start_ns, end_ns, attributes)
        start_ns = end_ns


def remote_parent(traceparent: str | None) -> AbstractContextManager[None]:
    """Spans inside the block belong to the caller's trace."""
    if _tracer is None or traceparent is None:
        return nullcontext()
    return _tracer.remote_parent(traceparent)


def now_ns() -> int:
    """Start of a span that is recorded later."""
    return time.time_ns()


@contextmanager
def installed(tracer: Tracer) -> Iterator[None]:
    """Use ``tracer`` inside the block (tests)."""
    before = _tracer
    install_tracer(tracer)
    try:
        yield
    finally:
        install_tracer(before)
