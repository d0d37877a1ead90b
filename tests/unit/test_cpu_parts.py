"""The parts of a server that are timed exist: a renamed function must not end a benchmark."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio
from benchmarks.harness.cpu_parts import CpuParts
from tests.fakes.service import fake_service

async def main():
    CpuParts().watch(fake_service())

asyncio.run(main())
"""


def test_every_part_is_found() -> None:
    # In a process of its own: what is wrapped stays wrapped.
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
