"""Every file in deploy/configs/ loads, and says what the documentation promises of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.cli.doctor_checks import CheckStatus
from shared.cli.doctor_config import configuration_checks
from shared.config.loading import dump_run_config, load_run_config
from shared.types import SpeculationMode

CONFIG_DIR = Path(__file__).resolve().parents[2] / "deploy" / "configs"
PRESETS = sorted(CONFIG_DIR.glob("*.yaml"))


def test_the_presets_the_documentation_names_exist() -> None:
    names = {path.stem for path in PRESETS}
    assert {"demo", "serve-cpu", "one-gpu-7b", "node-8gpu-7b"} <= names


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_preset_validates_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path, environment={})
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(copy, environment={}) == config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_preset_listens_on_loopback_only(path: Path) -> None:
    assert load_run_config(path, environment={}).server.host == "127.0.0.1"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_preset_is_named_like_its_file(path: Path) -> None:
    assert load_run_config(path, environment={}).name == path.stem


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_doctor_finds_nothing_that_would_fail(path: Path) -> None:
    results = configuration_checks(load_run_config(path, environment={}))
    assert [result for result in results if result.status is CheckStatus.FAILED] == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_cpu_preset_states_its_kv_budget(path: Path) -> None:
    engine = load_run_config(path, environment={}).engine
    if engine.device == "cpu":
        assert engine.num_kv_blocks is not None or engine.kv_cache_memory_mib is not None


def test_the_demo_speculates_behind_the_kv_gate_and_picks_a_free_port() -> None:
    config = load_run_config(CONFIG_DIR / "demo.yaml", environment={})
    assert config.speculation.mode is SpeculationMode.KV_GATE
    assert config.server.port == 0
    assert config.demo_model is not None


@pytest.mark.parametrize("name", ["serve-cpu", "one-gpu-7b", "node-8gpu-7b"])
def test_presets_for_work_choose_the_draft_length_by_cost(name: str) -> None:
    config = load_run_config(CONFIG_DIR / f"{name}.yaml", environment={})
    assert config.speculation.mode is SpeculationMode.ADAPTIVE


def test_the_demo_batch_needs_more_kv_blocks_than_its_threshold_leaves() -> None:
    config = load_run_config(CONFIG_DIR / "demo.yaml", environment={})
    engine, trainer = config.engine, config.trainer
    assert engine.num_kv_blocks is not None
    assert engine.block_size is not None
    running = min(engine.max_num_seqs, trainer.prompts_per_step * trainer.group_size)
    longest_blocks = -(-trainer.sampling.max_tokens // engine.block_size)
    assert running * longest_blocks > config.speculation.kv_cache_threshold * engine.num_kv_blocks
