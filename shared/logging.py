"""One set-up of stdlib logging for every process: text or JSON lines on stderr.

What a line is about (request, group, engine, version) comes from ``log_context``, which holds for
everything that is logged inside its block and in tasks started there. Prompts, completions and
request bodies are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from shared.types import LogFormat, LogLevel

NOISY_LOGGERS = ("httpx", "httpcore", "urllib3", "matplotlib", "asyncio")
"""Third-party loggers whose INFO lines describe themselves rather than this service."""

LogFields = Mapping[str, str | int]

_CONTEXT: ContextVar[LogFields] = ContextVar("log_context", default={})  # noqa: B039 - replaced whole, never changed


@contextmanager
def log_context(
    *,
    http_request_id: str | None = None,
    request_id: str | None = None,
    group_id: str | None = None,
    engine_id: str | None = None,
    weight_version: int | None = None,
) -> Iterator[None]:
    """Put these ids on every line logged inside the block; absent ones stay what they were.

    Args:
        http_request_id: ``X-Request-ID`` of the HTTP request.
        request_id: id of the rollout or completion request.
        group_id: one prompt of it, as the engine knows it.
        engine_id: where it runs.
        weight_version: version that is pushed or was sampled from.
    """
    given = {
        "http_request_id": http_request_id,
        "request_id": request_id,
        "group_id": group_id,
        "engine_id": engine_id,
        "weight_version": weight_version,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    token = _CONTEXT.set({**_CONTEXT.get(), **fields})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def log_fields() -> LogFields:
    """The ids that hold here and now."""
    return _CONTEXT.get()


class UtcFormatter(logging.Formatter):
    """Lines that sort by time, say which process wrote them, and end with their ids."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process_name: str) -> None:
        self.converter = time.gmtime
        super().__init__(f"%(asctime)s %(levelname)-7s {process_name} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without traceback."""
        fields = _fields_of(record)
        ids = " ".join(f"{name}={value}" for name, value in fields.items())
        return super().formatMessage(record) + (f" [{ids}]" if ids else "")


class JsonFormatter(UtcFormatter):
    """One JSON object per line: ``time``, ``level``, ``process``, ``logger``, ``message``, the ids
    of ``log_context``, and ``exception`` with the traceback where there is one."""

    def __init__(self, process_name: str) -> None:
        super().__init__(process_name)
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


FORMATTERS: Mapping[LogFormat, type[UtcFormatter]] = {
    LogFormat.TEXT: UtcFormatter,
    LogFormat.JSON: JsonFormatter,
}


def configure_logging(
    level: LogLevel | str,
    process_name: str,
    stream: TextIO | None = None,
    log_format: LogFormat = LogFormat.TEXT,
) -> None:
    """Send all of this process's log records to ``stream`` (stderr by default).

    Call it once at the start of a process; calling it again replaces the earlier settings.

    Args:
        level: threshold of our own loggers; noisy third-party ones are held at WARNING.
        process_name: shown on every line, such as ``server`` or ``engine-0``.
        log_format: of the lines.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(FORMATTERS[log_format](process_name))
    handler.addFilter(_note_fields)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(str(level))
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _note_fields(record: logging.LogRecord) -> bool:
    # On the record, because a formatter may run later and elsewhere (queue handlers).
    if not hasattr(record, "log_fields"):
        record.log_fields = _CONTEXT.get()
    return True


def _fields_of(record: logging.LogRecord) -> LogFields:
    fields: LogFields = getattr(record, "log_fields", {})
    return fields
