"""The speculation policy: from the configuration, and with live changes applied. Pure."""

from __future__ import annotations

from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import SpeculationPatch, SpeculationPolicy


def initial_policy(config: SpeculationConfig) -> SpeculationPolicy:
    """The policy engines start with."""
    return SpeculationPolicy(
        mode=config.mode,
        num_speculative_tokens=config.num_speculative_tokens,
        kv_cache_threshold=config.kv_cache_threshold,
        kv_cache_hysteresis=config.kv_cache_hysteresis,
        min_dwell_steps=config.min_dwell_steps,
    )


def apply_patch(policy: SpeculationPolicy, patch: SpeculationPatch) -> SpeculationPolicy:
    """The policy with the patch's given fields in place."""
    return policy.model_copy(update=patch.model_dump(exclude_none=True))
