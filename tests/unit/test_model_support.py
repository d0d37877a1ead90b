"""What cannot be served, or cannot draft, is refused before anything starts, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rollout_server.model_info import read_model_info
from shared.cli.doctor_config import check_model
from shared.cli.main import app
from shared.config.engine import DrafterConfig, EngineConfig
from shared.config.loading import validate_run_config
from shared.config.model_support import check_model_support, read_model_config
from shared.errors import ConfigurationError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "hidden_size": 128,
    "max_position_embeddings": 512,
}
NO_DRAFTER = "; set drafter.enabled: false and speculation.mode: off to serve it as it is"
UNSERVABLE = {
    "is_encoder_decoder true": (
        {"is_encoder_decoder": True},
        "an encoder-decoder model is no causal language model: rollouts continue a prompt",
    ),
    "architectures Qwen2ForSequenceClassification": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "a pooling, embedding or classification model samples no tokens; "
        "give a ...ForCausalLM checkpoint",
    ),
    "vision_config": (
        {"architectures": ["InternVLChatModel"], "vision_config": {"hidden_size": 8}},
        "prompts and weight pushes are those of a text model; "
        "give the text-only checkpoint (...ForCausalLM)",
    ),
    "architectures Gemma3ForConditionalGeneration": (
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        "prompts and weight pushes are those of a text model; "
        "give the text-only checkpoint (...ForCausalLM)",
    ),
    "quantization_config.quant_method gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "pushes carry F32, BF16 or F16 tensors, which a quantized checkpoint has no place for, "
        "and the drafter is quantized from float weights; give the unquantized checkpoint",
    ),
    "use_bidirectional_attention True": (
        {"use_bidirectional_attention": True},
        "only causal attention can continue a prompt token by token",
    ),
    "is_causal false": (
        {"is_causal": False},
        "only causal attention can continue a prompt token by token",
    ),
}
RECURRENT = (
    "a recurrent state holds all tokens so far: what a rejected draft did to it cannot be "
    "overwritten as a KV slot can"
)
EXPERTS = (
    "most of the bytes a step reads are experts, and vLLM 0.32.0 has no expert kernel for the "
    "drafter's schemes on every device (int8 on CPU needs AMX), so the drafter would read as much "
    "as the target and draft no faster"
)
CANNOT_DRAFT = {
    "num_experts 8": ({"num_experts": 8}, EXPERTS),
    "num_local_experts 4": ({"num_local_experts": 4}, EXPERTS),
    "moe_num_experts 16": ({"ffn_config": {"moe_num_experts": 16}}, EXPERTS),
    "layer_types with linear_attention": (
        {"layer_types": ["linear_attention", "full_attention"]},
        RECURRENT,
    ),
    "model_type mamba2": ({"model_type": "mamba2"}, RECURRENT),
    "mamba_d_state": ({"mamba_d_state": 16}, RECURRENT),
    "kv_lora_rank 512": (
        {"kv_lora_rank": 512},
        "latent attention (MLA) folds the float weight of kv_b_proj into its own at load, which a "
        "quantized drafter does not have, and vLLM 0.32.0 shares no KV cache of its layers",
    ),
    "rope_parameters.mrope_section": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        "vLLM 0.32.0 has no multi-dimensional rotary positions (M-RoPE) in draft models",
    ),
    "num_kv_shared_layers 10": (
        {"num_kv_shared_layers": 10},
        "layers that read another layer's KV cache have none of their own to share with the "
        "drafter",
    ),
    "attention_chunk_size 8192": (
        {"attention_chunk_size": 8192},
        "chunked local attention numbers its KV blocks anew at every chunk, and the drafter's "
        "one-token passes do not",
    ),
}


def check(changes: dict[str, Any], *, drafter: bool = True, **engine: Any) -> None:
    check_model_support(
        {**LLAMA, **changes}, EngineConfig(**engine), DrafterConfig(enabled=drafter)
    )


@pytest.mark.parametrize("found", UNSERVABLE)
def test_a_model_that_cannot_be_served_is_refused_with_and_without_a_drafter(found: str) -> None:
    changes, reason = UNSERVABLE[found]
    for drafter in (True, False):
        with pytest.raises(ConfigurationError) as error:
            check(changes, drafter=drafter)
        assert error.value.message == f"the model has {found} and cannot be served: {reason}"
        assert error.value.param == "model.path"


@pytest.mark.parametrize("found", CANNOT_DRAFT)
def test_a_model_that_cannot_draft_is_refused_unless_the_drafter_is_off(found: str) -> None:
    changes, reason = CANNOT_DRAFT[found]
    with pytest.raises(ConfigurationError) as error:
        check(changes)
    expected = f"the model has {found} and cannot draft for itself: {reason}{NO_DRAFTER}"
    assert error.value.message == expected
    assert error.value.param == "drafter.enabled"
    check(changes, drafter=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["ChatGLMForConditionalGeneration"]},
        {"num_experts": 0, "n_routed_experts": None, "quantization_config": None},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "is_causal": True},
        {"use_bidirectional_attention": False, "attn_logit_softcapping": 50.0},
    ],
)
def test_what_works_is_let_through(changes: dict[str, Any]) -> None:
    check(changes)


def test_values_that_vllm_will_override_are_the_ones_that_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="num_experts 8 and cannot draft"):
        check({}, vllm_args={"hf_overrides": {"num_experts": 8}})


def test_a_tensor_parallel_size_that_cuts_heads_is_refused() -> None:
    check({}, tensor_parallel_size=4)
    with pytest.raises(ConfigurationError) as error:
        check({}, tensor_parallel_size=3)
    assert error.value.message == (
        "engine.tensor_parallel_size 3 does not divide the model's 4 attention heads"
    )


INT4 = {"scheme": "int4"}
UNEVEN_FOR_INT4 = {
    "intermediate": (
        {"intermediate_size": 4928},
        {},
        1,
        "drafter.int4_group_size 128 does not divide the 4928 input channels of down_proj "
        "(intermediate_size 4928); set drafter.int4_group_size: 64",
    ),
    "ranks": (
        {"hidden_size": 896, "num_attention_heads": 14, "intermediate_size": 4864},
        {},
        2,
        "drafter.int4_group_size 128 does not divide the 448 input channels of o_proj "
        "(14 heads of 64 over engine.tensor_parallel_size 2); set drafter.int4_group_size: 64",
    ),
    "hidden": (
        {"hidden_size": 96, "head_dim": 32},
        {},
        1,
        "drafter.int4_group_size 128 does not divide the 96 input channels of qkv_proj, "
        "gate_up_proj, lm_head (hidden_size 96); set drafter.int4_group_size: 32",
    ),
    "nothing fits": (
        {"intermediate_size": 144},
        {"int4_group_size": 32},
        1,
        "drafter.int4_group_size 32 does not divide the 144 input channels of down_proj "
        "(intermediate_size 144); no group size does: leave such layers to the target with "
        "drafter.exclude [down_proj], or set drafter.scheme: int8",
    ),
}


@pytest.mark.parametrize("name", UNEVEN_FOR_INT4)
def test_int4_groups_that_do_not_divide_a_ranks_layers_are_refused(name: str) -> None:
    changes, drafter, ranks, message = UNEVEN_FOR_INT4[name]
    model = {**LLAMA, **changes}
    engine = EngineConfig(tensor_parallel_size=ranks)
    with pytest.raises(ConfigurationError) as error:
        check_model_support(model, engine, DrafterConfig.model_validate({**INT4, **drafter}))
    assert error.value.message == message
    assert error.value.param == "drafter.int4_group_size"
    # ``auto`` takes smaller groups by itself, and int8 has none.
    for scheme in ("auto", "int8"):
        settings = {**INT4, **drafter, "scheme": scheme}
        check_model_support(model, engine, DrafterConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("changes", "drafter", "ranks"),
    [
        ({"intermediate_size": 4864}, {}, 1),
        ({"intermediate_size": 144}, {"exclude": [r"mlp\.down_proj"]}, 1),
        ({"intermediate_size": 192}, {"int4_group_size": 64}, 1),
        ({"hidden_size": 256, "intermediate_size": 512}, {}, 2),
        ({"hidden_size": None, "n_embd": 768, "n_head": 12, "n_inner": None}, {}, 2),
    ],
)
def test_int4_groups_that_divide_what_is_quantized_are_let_through(
    changes: dict[str, Any], drafter: dict[str, Any], ranks: int
) -> None:
    check_model_support(
        {**LLAMA, **changes},
        EngineConfig(tensor_parallel_size=ranks),
        DrafterConfig.model_validate({**INT4, **drafter}),
    )


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A model directory of experts, without weights."""
    model = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**model, "num_local_experts": 4}))
    return tmp_path


def test_the_server_refuses_before_it_starts_anything(mixture: Path) -> None:
    refused = validate_run_config({"model": {"path": str(mixture)}})
    with pytest.raises(ConfigurationError, match="num_local_experts 4 and cannot draft"):
        read_model_info(refused)
    served = validate_run_config(
        {
            "model": {"path": str(mixture)},
            "drafter": {"enabled": False},
            "speculation": {"mode": "off"},
        }
    )
    assert read_model_info(served).vocab_size == 32


def test_doctor_and_config_show_refuse_the_same(mixture: Path) -> None:
    result = check_model(validate_run_config({"model": {"path": str(mixture)}}))
    assert result.status == "failed"
    assert result.detail.startswith("the model has num_local_experts 4 and cannot draft")
    shown = CliRunner().invoke(app, ["config", "show", "--set", f"model.path={mixture}"])
    assert shown.exit_code != 0
    assert isinstance(shown.exception, ConfigurationError)
    off = ["--set", "drafter.enabled=false", "--set", "speculation.mode=off"]
    shown = CliRunner().invoke(app, ["config", "show", "--set", f"model.path={mixture}", *off])
    assert shown.exit_code == 0


def test_a_broken_config_json_is_named(tmp_path: Path) -> None:
    assert read_model_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config.json is not valid JSON"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"config.json holds no JSON object"):
        read_model_config(str(tmp_path))
