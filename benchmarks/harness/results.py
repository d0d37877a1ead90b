"""Result files: the figures, and everything needed to know what they are figures of."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS_DIRECTORY = Path(__file__).parent.parent / "results"
PACKAGES = ("torch", "ray", "transformers")


def circumstances() -> dict[str, Any]:
    """Versions, commit and hardware."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "vllm": _vllm_version(),
        **{package: version(package) for package in PACKAGES},
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def write_result(result: dict[str, Any], raw: Any) -> Path:
    """Keep ``result`` with its circumstances and the raw measurements under ``result["bench"]``."""
    RESULTS_DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = RESULTS_DIRECTORY / f"{result['bench']}.json"
    document = {"result": result, "circumstances": circumstances(), "raw": raw}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def read_document(bench: str) -> dict[str, Any] | None:
    """All that an earlier run left under this name, as ``write_result`` keeps it."""
    path = RESULTS_DIRECTORY / f"{bench}.json"
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def read_result(bench: str) -> dict[str, Any] | None:
    """The result alone."""
    document = read_document(bench)
    return None if document is None else dict(document["result"])


def print_last_line(result: dict[str, Any]) -> None:
    """The one line programs read."""
    print(json.dumps(result), flush=True)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    return result.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
