"""A trainer that pushes once, in a process of its own, so that it can be killed in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from tests.support.server_process import SHARED_MEMORY

BEGIN_TIMEOUT_S = 60.0
PROGRAM = """
import sys
from pathlib import Path
import httpx
from tests.support.server_process import push_to
url, model, version, base, encoding = sys.argv[1:]
client = httpx.Client(base_url=url, timeout=90)
only_changes = encoding == "delta"
answer = push_to(client, Path(model), int(version), int(base), only_changes=only_changes)
print(answer.status_code, flush=True)
"""


def start_push(
    url: str, model: Path, version: int, base_version: int, encoding: Literal["full", "delta"]
) -> subprocess.Popen[str]:
    """It prints the status it is answered with, or nothing where it is killed or hears nothing."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, str(model), str(version), str(base_version), encoding],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def await_push(version: int) -> None:
    """Until its first bytes are in shared memory (or it has been through for a minute)."""
    pattern = f"-v{version}.safetensors"
    deadline = time.monotonic() + BEGIN_TIMEOUT_S
    while time.monotonic() < deadline:
        if any(pattern in name for name in os.listdir(SHARED_MEMORY)):
            return
        time.sleep(0.002)
