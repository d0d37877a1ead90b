"""A rollout server as users start it, with Ray and real engines: a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 180.0
POLL_S = 0.1
RUN_NAME = "bench"


class RealServer:
    """A server for the length of a ``with`` block, in a directory that goes with it.

    Args:
        settings: of the run's configuration; ``name``, ``output_dir`` and the port are set here.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="slipstream-bench-")
        root = Path(self._directory.name)
        config, self._log_path = root / "config.yaml", root / "log"
        settings = {**self._settings, "name": RUN_NAME, "output_dir": str(root)}
        settings["server"] = {**settings.get("server", {}), "port": 0}
        config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout_server", "--config", str(config)],
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
            )
        ready = root / RUN_NAME / "server.json"
        deadline_s = time.monotonic() + START_TIMEOUT_S
        try:
            while not ready.exists():
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(
                        f"the server did not start within {START_TIMEOUT_S:g} s: {self.log_end()}"
                    )
                time.sleep(POLL_S)
        except BaseException:  # an interrupt too: no server stays behind
            self.__exit__(None, None, None)
            raise
        url: str = json.loads(ready.read_text(encoding="utf-8"))["url"]
        self.port = int(url.rpartition(":")[2])
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """SIGTERM, so that it takes its engines with it; SIGKILL if it does not end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._directory.cleanup()

    def log_end(self) -> str:
        """For messages."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")[-2000:]
