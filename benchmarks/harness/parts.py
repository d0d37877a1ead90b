"""Runs the parts of a long check in processes of their own: one that fails or hangs loses nothing
but itself, and what it had written by then is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

END_GRACE_S = 10.0


def run_part(command: list[str], output: Path, limit_s: float) -> dict[str, Any]:
    """Run ``command``, which writes its result to ``output`` as JSON, for at most ``limit_s``.

    Returns:
        What it wrote, with ``status`` (``ok``, ``failed`` or ``timeout``), ``exit_code`` and
        ``elapsed_s``. Never raises for what goes wrong inside.
    """
    started = time.monotonic()
    # A session of its own, so that vLLM's processes end with it.
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    status = "ok"
    try:
        process.wait(timeout=max(limit_s, 1.0))
    except subprocess.TimeoutExpired:
        status = "timeout"
        end_group(process)
    if status == "ok" and process.returncode != 0:
        status = "failed"
    result: dict[str, Any] = {}
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
    elif status == "ok":
        status = "failed"
        result = {"error": "it ended without a result"}
    return {
        **result,
        "status": status,
        "exit_code": process.returncode,
        "elapsed_s": round(time.monotonic() - started, 1),
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group we started to end, then kill it."""
    for number, grace_s in ((signal.SIGTERM, END_GRACE_S), (signal.SIGKILL, END_GRACE_S)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=grace_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def save_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
