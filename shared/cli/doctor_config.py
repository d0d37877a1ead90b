"""Checks of a configuration that validates: is it safe, and can it work on this machine?"""

from __future__ import annotations

import os
from pathlib import Path

from shared.cli.doctor_checks import CheckResult, CheckStatus
from shared.cli.doctor_security import security_checks
from shared.config.metric_sinks import check_metric_sinks
from shared.config.model_support import check_configured_model
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from shared.types import DrafterScheme, TransportKind

CPU_BLOCK_MULTIPLE = 32
"""KV block sizes vLLM 0.32.0's CPU attention accepts are multiples of this."""

CPU_INFO = Path("/proc/cpuinfo")


def configuration_checks(config: RunConfig) -> list[CheckResult]:
    """Every check of one resolved configuration."""
    return [
        check_model(config),
        check_kv_budget(config),
        check_cores(config, len(os.sched_getaffinity(0))),
        check_transport(config),
        check_drafter(config, has_vnni=has_vnni(CPU_INFO)),
        check_sinks(config),
        *security_checks(config, os.environ),
    ]


def check_model(config: RunConfig) -> CheckResult:
    """The model is there and can be served as configured, can be made, or is a name for the hub."""
    path = config.model.path
    if (Path(path) / "config.json").exists():
        try:
            check_configured_model(config)
        except ConfigurationError as exc:
            return CheckResult(name="model.path", status=CheckStatus.FAILED, detail=exc.message)
        return CheckResult(name="model.path", status=CheckStatus.OK, detail=path)
    if config.demo_model is not None:
        detail = f"{path} is made by the first `slipstream run` ({config.demo_model.preset})"
        return CheckResult(name="model.path", status=CheckStatus.OK, detail=detail)
    detail = f"{path} is not a model directory here: it is taken for a name on the model hub"
    return CheckResult(name="model.path", status=CheckStatus.WARNING, detail=detail)


def check_kv_budget(config: RunConfig) -> CheckResult:
    """A CPU engine has no memory of its own to measure: it must be told its KV budget."""
    engine = config.engine
    if engine.device == "cpu" and engine.block_size and engine.block_size % CPU_BLOCK_MULTIPLE:
        detail = f"engine.block_size {engine.block_size} is not a multiple of {CPU_BLOCK_MULTIPLE}"
        return CheckResult(name="KV cache", status=CheckStatus.FAILED, detail=detail)
    if engine.num_kv_blocks is not None:
        detail = f"{engine.num_kv_blocks} blocks (engine.num_kv_blocks)"
    elif engine.kv_cache_memory_mib is not None:
        detail = f"{engine.kv_cache_memory_mib} MiB (engine.kv_cache_memory_mib)"
    elif engine.device == "cpu":
        detail = "set engine.kv_cache_memory_mib or engine.num_kv_blocks on device cpu"
        return CheckResult(name="KV cache", status=CheckStatus.WARNING, detail=detail)
    else:
        detail = f"sized by vLLM (engine.gpu_memory_utilization {engine.gpu_memory_utilization})"
    return CheckResult(name="KV cache", status=CheckStatus.OK, detail=detail)


def check_cores(config: RunConfig, num_usable_cores: int) -> CheckResult:
    """CPU engines on the same cores starve each other."""
    engine = config.engine
    count = engine.total_count
    if engine.device == "cuda" or count <= 1:
        return CheckResult(name="engine.cpu_cores", status=CheckStatus.OK, detail="one engine")
    distinct = len({c for pool in engine.all_pools for c in engine.of_pool(pool).cpu_cores})
    if distinct >= count:
        detail = f"{distinct} sets for {count} engines, {num_usable_cores} cores usable"
        return CheckResult(name="engine.cpu_cores", status=CheckStatus.OK, detail=detail)
    detail = f"{count} CPU engines share {distinct or 'all'} core sets: give each its own"
    return CheckResult(name="engine.cpu_cores", status=CheckStatus.WARNING, detail=detail)


def check_transport(config: RunConfig) -> CheckResult:
    """Trainer and server hand weights over in a directory that this host can write."""
    name, weights = "weights.transport", config.weights
    setting = (
        "filesystem_dir" if weights.transport is TransportKind.FILESYSTEM else "shared_memory_dir"
    )
    if not os.access(weights.directory, os.W_OK):
        detail = f"weights.{setting} {weights.directory} cannot be written"
        return CheckResult(name=name, status=CheckStatus.FAILED, detail=detail)
    detail = f"{weights.transport.value} in {weights.directory}"
    return CheckResult(name=name, status=CheckStatus.OK, detail=detail)


def check_drafter(config: RunConfig, *, has_vnni: bool) -> CheckResult:
    """Some schemes have no kernel on a CPU that drafts faster than the model decodes."""
    name, scheme = "drafter.scheme", config.drafter.scheme
    if config.engine.device == "cpu" and config.drafter.enabled:
        if scheme is DrafterScheme.FP8:
            detail = "fp8 has no fast kernel on CPUs: drafting costs time. Use int8 or auto"
            return CheckResult(name=name, status=CheckStatus.WARNING, detail=detail)
        if scheme is DrafterScheme.INT4 and not has_vnni:
            detail = "int4 is no faster than bfloat16 without AVX-512 VNNI or AMX. Use int8 or auto"
            return CheckResult(name=name, status=CheckStatus.WARNING, detail=detail)
    detail = scheme.value if config.drafter.enabled else "no drafter (drafter.enabled false)"
    return CheckResult(name=name, status=CheckStatus.OK, detail=detail)


def check_sinks(config: RunConfig) -> CheckResult:
    """The packages of the metric sinks are there."""
    name = "trainer.metric_sinks"
    try:
        check_metric_sinks(config.trainer)
    except ConfigurationError as exc:
        return CheckResult(name=name, status=CheckStatus.FAILED, detail=exc.message)
    detail = ", ".join(config.trainer.metric_sinks) or "metrics.jsonl only"
    return CheckResult(name=name, status=CheckStatus.OK, detail=detail)


def has_vnni(cpu_info: Path) -> bool:
    """Whether Linux lists AVX-512 VNNI or AMX among the CPU's features."""
    try:
        features = set(cpu_info.read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(features & {"avx512_vnni", "amx_tile"})
