"""A vLLM that is not the one the plugin was written for is refused at start, by name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_server.engine.vllm_plugin.compatibility import (
    CPU_SYMBOLS,
    REQUIRED_SYMBOLS,
    SUPPORTED_VLLM_VERSION,
    Symbol,
    check_compatibility,
)

pytestmark = [pytest.mark.slow]

ALL_SYMBOLS = REQUIRED_SYMBOLS + CPU_SYMBOLS
CHECK_UNTOUCHED_VLLM = """
from rollout_server.engine.vllm_plugin.compatibility import (
    CPU_SYMBOLS, REQUIRED_SYMBOLS, SUPPORTED_VLLM_VERSION, check_compatibility,
)
check_compatibility(SUPPORTED_VLLM_VERSION, REQUIRED_SYMBOLS + CPU_SYMBOLS)
"""
START_WITH_A_MOVED_SYMBOL = """
import asyncio, sys
from vllm.v1.core.sched.scheduler import Scheduler
del Scheduler._preempt_request
from rollout_server.engine.actor import EngineActor
from rollout_server.engine.arguments import EngineSpec
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig

spec = EngineSpec(
    engine_id="e", index=0, model=ModelConfig(path=sys.argv[1], dtype="float32"),
    engine=EngineConfig(), drafter=DrafterConfig(), speculation=SpeculationConfig(), device="cpu",
)
asyncio.run(EngineActor(spec).start())
"""


def name_of(symbol: Symbol) -> str:
    return f"{symbol.module}.{symbol.path}"


def test_the_installed_vllm_has_everything() -> None:
    # In a process of its own: engines started in this one have patched its vLLM.
    result = subprocess.run(
        [sys.executable, "-c", CHECK_UNTOUCHED_VLLM],
        env={**os.environ, "SLIPSTREAM_VLLM_PLUGIN": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.32.1+cpu"])
def test_another_version_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"found {version.replace('+', '.')}: install vllm=="):
        check_compatibility(version, ())


@pytest.mark.parametrize("symbol", ALL_SYMBOLS, ids=name_of)
def test_a_symbol_that_moved_is_named(monkeypatch: pytest.MonkeyPatch, symbol: Symbol) -> None:
    module = importlib.import_module(symbol.module)
    monkeypatch.delattr(module, symbol.path.split(".")[0])
    with pytest.raises(RuntimeError, match=f"{name_of(symbol)} is missing"):
        check_compatibility(SUPPORTED_VLLM_VERSION, ALL_SYMBOLS)


@pytest.mark.parametrize("symbol", [s for s in ALL_SYMBOLS if s.parameters], ids=name_of)
def test_a_parameter_that_went_is_named(monkeypatch: pytest.MonkeyPatch, symbol: Symbol) -> None:
    owner: object = importlib.import_module(symbol.module)
    *parents, attribute = symbol.path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    monkeypatch.setattr(owner, attribute, lambda: None)
    with pytest.raises(RuntimeError, match=f"{name_of(symbol)} no longer takes"):
        check_compatibility(SUPPORTED_VLLM_VERSION, ALL_SYMBOLS)


@pytest.mark.engine
def test_an_engine_on_a_vllm_without_a_symbol_does_not_start_and_says_why(
    tiny_model: Path,
) -> None:
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    result = subprocess.run(
        [sys.executable, "-c", START_WITH_A_MOVED_SYMBOL, str(tiny_model)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode != 0
    assert "Scheduler._preempt_request is missing" in result.stderr
    assert f"Reinstall the unmodified {SUPPORTED_VLLM_VERSION} release" in result.stderr
