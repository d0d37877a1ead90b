"""Arguments of vLLM that cannot work are refused before anything starts, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from shared.config.loading import validate_run_config
from shared.errors import ConfigurationError

REFUSED_ARGUMENTS = {
    "enable_lora": (
        True,
        False,
        "every push replaces the whole policy and requests name no adapter; "
        "merge the adapter into the weights before they are pushed",
    ),
    "data_parallel_size": (
        2,
        1,
        "vLLM sets no draft length per step under data parallelism, and a weight commit must reach "
        "every engine core; use engine.count instead",
    ),
    "runner": ("pooling", "generate", "a pooling or draft runner samples no tokens"),
    "convert": ("embed", "none", "a converted model samples no tokens"),
    "watermark_config": ({"key": 1}, None, "a watermark changes the policy's distribution"),
    "diffusion_config": (
        {"steps": 4},
        None,
        "a diffusion model has no causal policy to sample from",
    ),
}
REFUSED_WITH_A_DRAFTER = {
    "pipeline_parallel_size": "the drafter runs on the last rank and shares layers and KV cache "
    "that lie on the others; use engine.tensor_parallel_size, or drafter.enabled: false",
    "decode_context_parallel_size": "the drafter writes its provisional KV by slots of one rank; "
    "use engine.tensor_parallel_size, or drafter.enabled: false",
    "prefill_context_parallel_size": "the drafter writes its provisional KV by slots of one rank; "
    "use engine.tensor_parallel_size, or drafter.enabled: false",
}


def configuration(arguments: dict[str, Any], *, drafter: bool = True) -> dict[str, Any]:
    return {
        "model": {"path": "anything"},
        "engine": {"vllm_args": arguments},
        "drafter": {"enabled": drafter},
        "speculation": {"mode": "kv_gate" if drafter else "off"},
    }


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_arguments_of_vllm_that_cannot_work_are_refused(name: str) -> None:
    value, harmless, reason = REFUSED_ARGUMENTS[name]
    for drafter in (True, False):
        with pytest.raises(ConfigurationError) as error:
            validate_run_config(configuration({name: value}, drafter=drafter))
        expected = f"engine.vllm_args.{name} {value!r} cannot work: {reason}"
        assert error.value.message == f"configuration: {expected}"
    validate_run_config(configuration({name: harmless}))


@pytest.mark.parametrize("name", REFUSED_WITH_A_DRAFTER)
def test_kinds_of_parallelism_the_drafter_cannot_follow_need_it_off(name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        validate_run_config(configuration({name: 2}))
    expected = f"engine.vllm_args.{name} 2 cannot work: {REFUSED_WITH_A_DRAFTER[name]}"
    assert error.value.message == f"configuration: {expected}"
    validate_run_config(configuration({name: 2}, drafter=False))


@pytest.mark.parametrize(
    "name", ["speculative_config", "spec_method", "spec_model", "spec_tokens", "scheduler_cls"]
)
def test_no_argument_of_vllm_reaches_speculation_past_our_settings(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"engine.vllm_args may not set {name}"):
        validate_run_config(configuration({name: "synthetic"}))
