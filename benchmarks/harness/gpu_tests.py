"""Runs every test marked ``gpu`` and counts the outcomes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
MESSAGE_LENGTH = 300


def run_gpu_tests() -> dict[str, Any]:
    """Outcome counts, and the failures' messages."""
    with tempfile.TemporaryDirectory(prefix="slipstream-gpu-tests-") as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q"]
        # No cache folder: the checkout may be read-only.
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        outcomes = read_report(report) if report.exists() else {}
    return {**outcomes, "exit_code_of_pytest": code}


def read_report(report: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            counts["failed"] += 1
            failures[name] = (problem.get("message") or "")[:MESSAGE_LENGTH]
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures}
