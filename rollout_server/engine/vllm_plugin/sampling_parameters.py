"""Lets min-p and logit bias through where vLLM would refuse them because speculation is configured.

vLLM builds neither processor for an engine with a drafter and refuses requests that ask for them,
since its rejection sampler does not apply them. Ours does (``drafter/constraints.py``), and plain
steps apply them anyway.

Leans on (vLLM 0.32.0): ``SamplingParams._validate_spec_decode``; ``build_logitsprocs`` as called by
``GPUModelRunner``, which drops every built-in processor but ``MinTokensLogitsProcessor`` when
``vllm_config.speculative_config`` is set.
"""

from __future__ import annotations

import copy
from typing import Any


def allow_under_speculation(validate: Any) -> Any:
    """Wrap ``SamplingParams._validate_spec_decode``: what it refuses is what we support."""

    def wrapped(parameters: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, "method", None) != "draft_model":
            validate(parameters, speculative_config)

    return wrapped


def keep_every_processor(build: Any) -> Any:
    """Wrap ``build_logitsprocs``: the processors an engine without speculation has.

    Custom processors stay refused: verification applies the built-in ones only.
    """

    def wrapped(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom: Any = ()
    ) -> Any:
        config = vllm_config
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method == "draft_model" and not custom:
            config = copy.copy(vllm_config)
            config.speculative_config = None
        return build(config, device, is_pin_memory, is_pooling_model, custom)

    return wrapped
