"""The arithmetic of docs/sizing.md: against published models, real quantization and the presets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rollout_server.drafter.schemes import quantize_int4_groups, quantize_int8_per_channel
from shared.cli.main import app
from shared.config.engine import DrafterConfig
from shared.config.run import RunConfig
from shared.errors import ConfigurationError
from shared.sizing.engine_memory import (
    GIB,
    kv_bytes_per_token,
    num_drafter_bytes,
    num_push_bytes,
    num_trainer_bytes,
    plan_engine_memory,
)
from shared.sizing.model_shape import ModelShape, model_shape
from shared.sizing.tables import MODELS, PAGE, cuda_presets, preset_memory, with_tables
from shared.types import DrafterScheme

TINY = ModelShape(
    hidden_size=256,
    intermediate_size=512,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=384,
)
CONFIG_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def settings(**engine: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": "x", "dtype": "bfloat16"}, "engine": {"device": "cuda", **engine}}
    )


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
    ],
)
def test_a_model_has_as_many_parameters_as_its_model_card_says(
    name: str, num_parameters: int
) -> None:
    assert MODELS[name].num_parameters == num_parameters


def test_a_shape_is_read_from_the_configuration_of_a_model() -> None:
    assert model_shape(CONFIG_7B) == MODELS["Qwen/Qwen2.5-7B-Instruct"]


def test_without_kv_heads_every_head_has_its_own() -> None:
    config = {key: value for key, value in CONFIG_7B.items() if key != "num_key_value_heads"}
    assert model_shape(config).num_kv_heads == 28


def test_a_mixture_of_experts_is_not_counted() -> None:
    with pytest.raises(ConfigurationError, match="num_experts 64"):
        model_shape({**CONFIG_7B, "num_experts": 64})


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in CONFIG_7B.items() if key != "vocab_size"}
    with pytest.raises(ConfigurationError, match="vocab_size None"):
        model_shape(config)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_int4_drafter_weighs_what_quantization_makes_of_it(symmetric: bool) -> None:
    counted = 0
    for linear in (*TINY.layer_linears, TINY.lm_head):
        packed = quantize_int4_groups(
            torch.randn(linear.num_outputs, linear.num_inputs), group_size=64, symmetric=symmetric
        )
        counted += packed.packed_NP.nbytes + packed.scales_NG.to(torch.bfloat16).nbytes
        if packed.zeros_NG is not None:
            counted += packed.zeros_NG.nbytes // 2  # four bits each, once packed
    drafter = DrafterConfig(scheme=DrafterScheme.INT4, int4_group_size=64, int4_symmetric=symmetric)
    assert num_drafter_bytes(TINY, drafter, 2) == counted


def test_an_int8_drafter_weighs_what_quantization_makes_of_it() -> None:
    counted = 0
    for linear in TINY.layer_linears:
        packed = quantize_int8_per_channel(torch.randn(linear.num_outputs, linear.num_inputs))
        counted += packed.values_NK.nbytes + packed.scales_N1.nbytes
    drafter = DrafterConfig(scheme=DrafterScheme.INT8, quantize_lm_head=False)
    assert num_drafter_bytes(TINY, drafter, 2) == counted


def test_without_a_drafter_nothing_is_kept_for_one() -> None:
    assert num_drafter_bytes(TINY, DrafterConfig(enabled=False), 2) == 0


def test_a_token_has_a_key_and_a_value_in_every_layer() -> None:
    assert kv_bytes_per_token(MODELS["Qwen/Qwen2.5-7B-Instruct"], 2) == 2 * 28 * 4 * 128 * 2


def test_ranks_share_the_heads_until_each_has_one() -> None:
    shape = MODELS["Qwen/Qwen2.5-7B-Instruct"]
    whole = kv_bytes_per_token(shape, 2)
    assert kv_bytes_per_token(shape, 2, 2) == whole // 2
    assert kv_bytes_per_token(shape, 2, 8) == kv_bytes_per_token(shape, 2, 4) == whole // 4


def test_the_parts_of_a_gpu_make_up_what_vllm_may_take() -> None:
    memory = plan_engine_memory(MODELS["Qwen/Qwen2.5-7B-Instruct"], settings(), 80 * GIB)
    parts = memory.target_bytes + memory.drafter_bytes + memory.work_bytes
    assert parts + memory.context_bytes + memory.kv_bytes == memory.budget_bytes
    assert memory.budget_bytes == int(80 * GIB * 0.85)


def test_more_running_sequences_and_drafts_leave_less_for_the_kv_cache() -> None:
    shape = MODELS["Qwen/Qwen2.5-7B-Instruct"]
    few = plan_engine_memory(shape, settings(max_num_seqs=64), 80 * GIB)
    many = plan_engine_memory(shape, settings(max_num_seqs=256), 80 * GIB)
    assert many.kv_bytes < few.kv_bytes
    undrafted = settings(max_num_seqs=256).model_copy(
        update={"drafter": DrafterConfig(enabled=False)}
    )
    plain = plan_engine_memory(shape, undrafted, 80 * GIB)
    assert plain.work_bytes < many.work_bytes


def test_a_kv_budget_that_is_set_is_not_exceeded() -> None:
    config = settings(kv_cache_memory_mib=1024)
    assert plan_engine_memory(TINY, config, 80 * GIB).kv_bytes == GIB


def test_a_model_that_does_not_fit_is_refused_with_what_to_set() -> None:
    shape = MODELS["Qwen/Qwen2.5-32B-Instruct"]
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size 1.*max_num_seqs 64"):
        plan_engine_memory(shape, settings(), 48 * GIB)
    assert plan_engine_memory(shape, settings(tensor_parallel_size=4), 48 * GIB).kv_bytes > 0


def test_a_push_holds_two_versions_and_a_trainer_four_floats_a_parameter() -> None:
    assert num_push_bytes(TINY, 2) == 4 * TINY.num_parameters
    assert num_trainer_bytes(TINY) == 16 * TINY.num_parameters
    assert replace(TINY, has_tied_embeddings=True).num_parameters < TINY.num_parameters


@pytest.mark.parametrize(
    ("path", "config"), list(cuda_presets()), ids=lambda item: getattr(item, "stem", "")
)
def test_a_cuda_preset_has_room_for_long_sequences(path: Path, config: RunConfig) -> None:
    memory = preset_memory(config)
    assert config.model.max_model_len is not None
    assert memory.num_sequences(config.model.max_model_len) >= 8


@pytest.mark.parametrize(
    ("path", "config"), list(cuda_presets()), ids=lambda item: getattr(item, "stem", "")
)
def test_the_engines_of_a_node_preset_fit_the_gpus_it_is_named_for(
    path: Path, config: RunConfig
) -> None:
    num_gpus = {"one": 1, "node": 8}[path.stem.partition("-")[0]]
    assert config.engine.count * config.engine.tensor_parallel_size <= num_gpus
    assert config.engine.max_count * config.engine.tensor_parallel_size <= num_gpus or (
        "max_count" not in config.engine.model_fields_set
    )


def test_the_page_has_the_tables_as_they_are_computed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- sizing:") == 3
    assert with_tables(text) == text, "run: python -m shared.sizing"


def test_an_edited_table_is_noticed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    edited = text.replace("| Qwen2.5-7B |", "| Qwen2.5-8B |", 1)
    assert edited != text
    assert with_tables(edited) == text


def test_the_command_prints_how_many_sequences_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_7B))
    settings_of = ["--set", f"model.path={tmp_path}", "--set", "engine.device=cuda"]
    arguments = ["sizing", "--gpu-memory-gib", "80", "--tokens", "4096", *settings_of]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["kv_bytes_per_token"] == 57344
    assert answer["num_sequences"] == answer["num_kv_tokens"] // 4096
    table = CliRunner().invoke(app, arguments)
    assert f"{answer['num_sequences']:,} sequences" in " ".join(table.stdout.split())


def test_the_command_says_what_it_needs_of_an_unknown_model() -> None:
    result = CliRunner().invoke(
        app, ["sizing", "--gpu-memory-gib", "80", "--set", "model.path=nobody/nothing"]
    )
    assert isinstance(result.exception, ConfigurationError)
    assert "config.json" in result.exception.message
