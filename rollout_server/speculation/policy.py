"""The speculation policy: from the configuration, and with live changes applied. Pure."""

from __future__ import annotations

from shared.config.speculation import SpeculationConfig
from shared.schemas.speculation import SpeculationPatch, SpeculationPolicy


def initial_policy(config: SpeculationConfig) -> SpeculationPolicy:
    """The policy engines start with."""
    return SpeculationPolicy.model_validate(
        config.model_dump(include=set(SpeculationPolicy.model_fields))
    )


def apply_patch(policy: SpeculationPolicy, patch: SpeculationPatch) -> SpeculationPolicy:
    """The policy with the patch's given fields in place."""
    changes = patch.model_dump(exclude_none=True)
    if patch.kv_cache_threshold is not None:
        changes["kv_cache_threshold_tokens"] = None  # there is one threshold: the latest given
    return policy.model_copy(update=changes)


def whole_patch(policy: SpeculationPolicy) -> SpeculationPatch:
    """Every field, so that an engine that missed an earlier change is right again.

    Of the two thresholds only the one in force: giving the fraction takes back the tokens.
    """
    given = policy.model_dump()
    if policy.kv_cache_threshold_tokens is not None:
        del given["kv_cache_threshold"]
    return SpeculationPatch.model_validate(given)
