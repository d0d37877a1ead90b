"""One log format for every process: time, level, process, logger, message, on stderr."""

from __future__ import annotations

import logging
import sys
import time
from typing import Literal, TextIO

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

NOISY_LOGGERS = ("httpx", "httpcore", "urllib3", "matplotlib", "asyncio")
"""Third-party loggers whose INFO lines describe themselves rather than this service."""


class UtcFormatter(logging.Formatter):
    """Lines that sort by time and say which process wrote them."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process_name: str) -> None:
        self.converter = time.gmtime
        super().__init__(f"%(asctime)s %(levelname)-7s {process_name} %(name)s: %(message)s")


def configure_logging(
    level: LogLevel | str, process_name: str, stream: TextIO | None = None
) -> None:
    """Send all of this process's log records to ``stream`` (stderr by default).

    Call it once at the start of a process; calling it again replaces the earlier settings.

    Args:
        level: threshold of our own loggers; noisy third-party ones are held at WARNING.
        process_name: shown on every line, such as ``server`` or ``engine-0``.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(UtcFormatter(process_name))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
