"""Schemathesis against a running server, as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PHASES = "examples,coverage,fuzzing,stateful"
REQUEST_TIMEOUT_S = 30
CONFIG = Path(__file__).with_name("schemathesis.toml")
_CASES = re.compile(r"([0-9]+) generated")
_FAILURES = re.compile(r"([0-9]+) found ([0-9]+) unique failures")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemaRun:
    """What schemathesis says."""

    cases: int
    exit_code: int
    """0: no check failed."""
    output: str


def run_schemathesis(
    url: str,
    directory: Path,
    *,
    max_examples: int,
    seed: int,
    key: str | None,
    timeout_s: float,
    checks: str = "all",
) -> SchemaRun:
    """Every phase and check.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout_s``.
    """
    authorization = [] if key is None else ["--header", f"Authorization: Bearer {key}"]
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", f"{url}/openapi.json", "--continue-on-failure"),
        *("--phases", PHASES, "--checks", checks, "--mode", "all", "--workers", "1"),
        *("--max-examples", str(max_examples), "--seed", str(seed), "--no-color"),
        *("--request-timeout", str(REQUEST_TIMEOUT_S), "--suppress-health-check", "all"),
        *authorization,
    ]
    # Hypothesis keeps its examples where it runs.
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    output = done.stdout + done.stderr
    cases = _CASES.search(output)
    return SchemaRun(
        cases=0 if cases is None else int(cases[1]), exit_code=done.returncode, output=output
    )
