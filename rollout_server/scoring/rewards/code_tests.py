"""Reward for a completion whose code passes unit tests.

Code and tests run in a process of their own, ``code_runner.py``. They are code from outside:
``scoring.allow_code_execution`` has to be set.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from rollout_server.scoring.confinement import adopt_orphans, child_pids
from rollout_server.scoring.signature import RewardParamError

LANGUAGES = ("", "py", "python", "python3")
"""Of code blocks that are taken for the solution."""
MAX_TESTS = 256
MIN_MEMORY_MIB = 128
MAX_SHOWN_ERRORS = 3
RUNNER = "rollout_server.scoring.code_runner"
RUNNER_START_S = 10.0
"""Beyond ``timeout_s``, which the runner keeps by itself, on a machine that is busy."""


def code_tests(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    tests: list[str] | None = None,
    partial: bool = False,
    test_timeout_s: float = 2.0,
    timeout_s: float = 8.0,
    max_memory_mib: int = 512,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> tuple[float, dict[str, Any]]:
    """``correct`` when every test passes, else ``wrong``.

    The code is the completion's last code block in Python, or all of it when it has no code blocks.
    A test is Python that runs after the code, in its namespace, and passes when it raises nothing:
    ``assert add(1, 2) == 3``. Each has a process of its own, without network and without writing to
    files. Code that never ends, or ends the process, fails its test; it is no failure of the
    reward.

    Args:
        tests: absent stands for those of the answer: a JSON list of tests, or one test as it is.
        partial: the share of passed tests decides between ``wrong`` and ``correct``.
        test_timeout_s: of each test, the code before it included.
        timeout_s: of all tests together; those that had no turn by then have failed. Should be
            below ``scoring.timeout_s``.
        max_memory_mib: address space of each process.

    Raises:
        ValueError: there are no tests, or one is not Python.
    """
    sources = _tests_of(answer) if tests is None else tests
    if not sources:
        raise ValueError("code_tests needs tests, as a parameter or as the prompt's answer")
    report = _run(
        {
            "code": extract_code(completion),
            "tests": sources,
            "test_timeout_s": test_timeout_s,
            "timeout_s": timeout_s,
            "max_memory_mib": max_memory_mib,
        },
        timeout_s=timeout_s + RUNNER_START_S,
    )
    errors = [error for error in report["errors"] if error is not None]
    num_passed = len(sources) - len(errors)
    detail = {
        "num_passed": num_passed,
        "num_tests": len(sources),
        "errors": errors[:MAX_SHOWN_ERRORS],
    }
    if not errors:
        return correct, detail
    share = num_passed / len(sources) if partial else 0.0
    return wrong + (correct - wrong) * share, detail


def extract_code(completion: str) -> str:
    """The last code block in Python; one that is cut off counts. Without any block, everything."""
    code: str | None = None
    language: str | None = None  # of the block we are in
    lines: list[str] = []
    for line in completion.split("\n"):
        mark = line.strip()
        if language is None and mark.startswith("```"):
            language, lines = mark[3:].strip().lower(), []
            code = code or ""
        elif language is not None and mark == "```":
            code = "\n".join(lines) if language in LANGUAGES else code
            language = None
        elif language is not None:
            lines.append(line)
    if language in LANGUAGES:
        return "\n".join(lines)
    return completion if code is None else code


def _tests_of(answer: str | None) -> list[str]:
    if answer is None or not answer.strip():
        return []
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return [answer]
    if isinstance(found, list) and all(isinstance(test, str) for test in found):
        return found
    return [answer]


def _run(job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Have the runner do it; nothing it has started is left, even if code ends the runner.

    Raises:
        ValueError: it refuses a test, or cannot confine itself.
        RuntimeError: it did not come to its end.
    """
    earlier = child_pids(os.getpid())
    # Only meanwhile: nobody waits for orphans that other rewards may leave.
    adopt_orphans(True)
    try:
        run = subprocess.run(
            [sys.executable, "-P", "-B", "-m", RUNNER, str(os.getpid())],
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_environment(),
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise RuntimeError(f"the runner of code_tests did not end within {timeout_s:g} s") from exc
    finally:
        _end_children(earlier)
        adopt_orphans(False)
    try:
        report = json.loads(run.stdout)
    except ValueError as exc:
        raise RuntimeError(f"the runner of code_tests ended with code {run.returncode}") from exc
    if "refused" in report:
        raise ValueError(f"code_tests: {report['refused']}")
    return dict(report)


def _end_children(earlier: set[int]) -> None:
    """Kill and reap those that are new, and the orphans that become ours by it."""
    while new := child_pids(os.getpid()) - earlier:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _environment() -> dict[str, str]:
    """Nothing of ours but where our own code is; the runner forgets that too before it runs any."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "PYTHONHASHSEED": "0",  # the same code has the same reward
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def check_code_tests_params(params: Mapping[str, Any]) -> None:
    """Refuse what makes no sense, and tests that are none.

    Raises:
        RewardParamError: naming the parameter and its value.
    """
    tests = params.get("tests")
    if tests is not None and (
        not isinstance(tests, list)
        or not 1 <= len(tests) <= MAX_TESTS
        or not all(isinstance(test, str) and test.strip() for test in tests)
    ):
        raise RewardParamError("tests", f"is not a list of 1 to {MAX_TESTS} texts")
    for name in ("test_timeout_s", "timeout_s"):
        if name in params and params[name] <= 0:
            raise RewardParamError(name, f"is {params[name]}, which is not above 0")
    memory = params.get("max_memory_mib", MIN_MEMORY_MIB)
    if memory < MIN_MEMORY_MIB:
        raise RewardParamError("max_memory_mib", f"is {memory}, which is below {MIN_MEMORY_MIB}")
