"""What a process tells about itself: logs and traces. Metrics are always served at ``/metrics``."""

from __future__ import annotations

from pydantic import Field

from shared.config.base import SettingsModel
from shared.types import LogFormat, LogLevel


class LoggingConfig(SettingsModel):
    """Logs of our own processes, on stderr (``slipstream run`` puts them into files)."""

    level: LogLevel = LogLevel.INFO
    """The least urgent lines that are written."""
    format: LogFormat = LogFormat.TEXT
    """``json`` is one object per line, with request, group, engine and version as fields."""


class TracingConfig(SettingsModel):
    """OpenTelemetry spans of groups and pushes. Needs the extra ``tracing``."""

    enabled: bool = False
    """Nothing of OpenTelemetry is imported while it is false."""
    endpoint: str = "http://127.0.0.1:4318/v1/traces"
    """Where spans go, as OTLP over HTTP."""
    sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of traces that are kept; one that a caller began keeps the caller's decision."""
    service_name: str = Field(default="slipstream", min_length=1)
    """What the spans call this service."""
