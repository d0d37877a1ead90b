"""``engine.vllm_args`` that cannot be had, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import JsonValue


class RefusedArgument(NamedTuple):
    """An argument of vLLM's, refused unless it has a harmless value."""

    reason: str
    harmless: tuple[JsonValue, ...]
    drafting_only: bool = False
    """True: allowed with ``drafter.enabled: false``."""


OFF: tuple[JsonValue, ...] = (None, False)
ONE: tuple[JsonValue, ...] = (None, 1)

REFUSED_VLLM_ARGUMENTS: dict[str, RefusedArgument] = {
    "enable_lora": RefusedArgument(
        "every push replaces the whole policy and requests name no adapter; "
        "merge the adapter into the weights before they are pushed",
        OFF,
    ),
    "data_parallel_size": RefusedArgument(
        "vLLM sets no draft length per step under data parallelism, and a weight commit must reach "
        "every engine core; use engine.count instead",
        ONE,
    ),
    "pipeline_parallel_size": RefusedArgument(
        "the drafter runs on the last rank and shares layers and KV cache that lie on the others; "
        "use engine.tensor_parallel_size, or drafter.enabled: false",
        ONE,
        drafting_only=True,
    ),
    "decode_context_parallel_size": RefusedArgument(
        "the drafter writes its provisional KV by slots of one rank; use "
        "engine.tensor_parallel_size, or drafter.enabled: false",
        ONE,
        drafting_only=True,
    ),
    "prefill_context_parallel_size": RefusedArgument(
        "the drafter writes its provisional KV by slots of one rank; use "
        "engine.tensor_parallel_size, or drafter.enabled: false",
        ONE,
        drafting_only=True,
    ),
    "runner": RefusedArgument(
        "a pooling or draft runner samples no tokens", (None, "auto", "generate")
    ),
    "convert": RefusedArgument("a converted model samples no tokens", (None, "auto", "none")),
    "watermark_config": RefusedArgument("a watermark changes the policy's distribution", (None,)),
    "diffusion_config": RefusedArgument(
        "a diffusion model has no causal policy to sample from", (None,)
    ),
}


def vllm_arguments_problem(
    arguments: Mapping[str, JsonValue], *, drafter_enabled: bool
) -> str | None:
    """What is wrong with ``engine.vllm_args``, or None."""
    for name, refused in REFUSED_VLLM_ARGUMENTS.items():
        value = arguments.get(name)
        if value in refused.harmless or (refused.drafting_only and not drafter_enabled):
            continue
        return f"engine.vllm_args.{name} {value!r} cannot work: {refused.reason}"
    return None
