"""Programs that only note how they were called, for tests of shell scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys, time
name = os.path.basename(sys.argv[0])
def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{{name}} {{what}}\\n")
def stop(number, frame):
    note("told to end")
    time.sleep(float(os.environ.get("END_S", "0")))
    note("ended")
    os._exit(int(os.environ.get("TERM_CODE", "0")))
signal.signal(signal.SIGTERM, stop)
keys = sorted(key for key in os.environ if key.startswith("SLIPSTREAM_API"))
started = "started " + " ".join(sys.argv[1:]) + (" with " + ",".join(keys) if keys else "")
{body}
note(started)
while True:
    time.sleep(0.05)
"""
"""``body`` runs before the start is noted; it may note it itself and end."""


class Stage:
    """Stand-ins in a directory that comes first on the path, and what they noted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir()
        self._notes = directory / "notes"
        self._notes.touch()
        self._processes: list[subprocess.Popen[str]] = []

    def stand_in(self, name: str, body: str = "") -> None:
        """A program that runs until it is told to end."""
        self.executable(name, STAND_IN.format(python=sys.executable, body=body))

    def executable(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {"PATH": f"{self.bin}:{os.environ['PATH']}", "NOTES": str(self._notes)}
        process = subprocess.Popen(
            command,
            env=inherited | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines()

    def wait_for(self, note: str) -> None:
        """Until a line begins with it."""
        self._until(lambda: any(line.startswith(note) for line in self.notes()), note)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(1200):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError(f"{what!r} did not come; notes: {self.notes()}")
