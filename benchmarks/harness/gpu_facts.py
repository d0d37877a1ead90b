"""What a result of a CUDA machine was measured on, also where the package is not installed."""

from __future__ import annotations

import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vllm", "torch", "triton", "transformers", "compressed-tensors")
ROOT = Path(__file__).resolve().parents[2]


def gpu_facts() -> dict[str, Any]:
    """Versions, commit and device; what cannot be told is None."""
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": _git("status", "--porcelain", "--untracked-files=no")
        not in ("", None),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["device_memory_bytes"] = properties.total_memory
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    return facts


def _git(*arguments: str) -> str | None:
    """Output of git; None without git or outside a repository."""
    return _output("git", "-C", str(ROOT), *arguments)


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(program: str, *arguments: str) -> str | None:
    if shutil.which(program) is None:
        return None
    result = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
