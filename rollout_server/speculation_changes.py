"""Live changes of a speculation policy: checked before any engine is touched, and told. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from rollout_server.speculation.policy import apply_patch
from shared.config.speculation import never_opens
from shared.errors import InvalidRequestError
from shared.schemas.speculation import SpeculationPatch, SpeculationPolicy
from shared.types import SpeculationMode


def patched_policy(
    policy: SpeculationPolicy,
    patch: SpeculationPatch,
    max_num_speculative_tokens: int,
    kv_capacity_tokens: Mapping[str, int] | None = None,
) -> SpeculationPolicy:
    """``policy`` with the fields of ``patch`` that are set.

    Args:
        max_num_speculative_tokens: what the engines reserved KV slots for; 0 without a drafter.
        kv_capacity_tokens: KV slots of the engines that are to follow it, where they are known.

    Raises:
        InvalidRequestError: the result is impossible; names field, value and limit.
    """
    new = apply_patch(policy, patch)
    if max_num_speculative_tokens == 0:
        if new.mode is not SpeculationMode.OFF:
            raise InvalidRequestError(
                f"mode {new.mode.value} needs a drafter and the engines have none "
                "(drafter.enabled false); only off is possible",
                param="mode",
            )
    elif new.num_speculative_tokens > max_num_speculative_tokens:
        raise InvalidRequestError(
            f"num_speculative_tokens {new.num_speculative_tokens} is above the limit of "
            f"{max_num_speculative_tokens} (speculation.max_num_speculative_tokens at start)",
            param="num_speculative_tokens",
        )
    _check_hysteresis(new, patch, kv_capacity_tokens or {})
    return new


def _check_hysteresis(
    new: SpeculationPolicy, patch: SpeculationPatch, kv_capacity_tokens: Mapping[str, int]
) -> None:
    tokens = new.kv_cache_threshold_tokens
    if tokens is None:
        if never_opens(new.kv_cache_hysteresis, new.kv_cache_threshold):
            at_fault = "kv_cache_threshold" if patch.kv_cache_hysteresis is None else None
            raise InvalidRequestError(
                f"kv_cache_hysteresis {new.kv_cache_hysteresis:g} is not below kv_cache_threshold "
                f"{new.kv_cache_threshold:g}: the gate could never open again",
                param=at_fault or "kv_cache_hysteresis",
            )
        return
    for engine_id, capacity in kv_capacity_tokens.items():
        if never_opens(new.kv_cache_hysteresis * capacity, tokens):
            at_fault = "kv_cache_threshold_tokens" if patch.kv_cache_hysteresis is None else None
            raise InvalidRequestError(
                f"kv_cache_hysteresis {new.kv_cache_hysteresis:g} is "
                f"{new.kv_cache_hysteresis * capacity:.0f} of the {capacity} KV tokens of "
                f"{engine_id}, not below kv_cache_threshold_tokens {tokens}: the gate could never "
                "open again",
                param=at_fault or "kv_cache_hysteresis",
            )


def differences(old: SpeculationPolicy, new: SpeculationPolicy) -> str:
    """``mode kv_gate -> off, min_dwell_steps 8 -> 4``; what stays is left out."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    changed = [
        f"{name} {_shown(value)} -> {_shown(after[name])}"
        for name, value in before.items()
        if after[name] != value
    ]
    return ", ".join(changed) or "nothing"


def describe_change_for_all(
    old: SpeculationPolicy,
    new: SpeculationPolicy,
    overrides: Mapping[str, SpeculationPolicy],
    engine_ids: list[str],
) -> str:
    """For the audit line: the policy for all was changed and ``overrides`` ended with it."""
    text = f"{differences(old, new)} on all engines ({', '.join(engine_ids) or 'none yet'})"
    if overrides:
        ended = "; ".join(
            f"{engine_id}: {differences(policy, new)}" for engine_id, policy in overrides.items()
        )
        text += f"; settings of their own ended: {ended}"
    return text


def describe_change_per_engine(
    old: Mapping[str, SpeculationPolicy], new: Mapping[str, SpeculationPolicy]
) -> str:
    """For the audit line: some engines got settings of their own."""
    return "; ".join(
        f"{differences(old[engine_id], policy)} on {engine_id}" for engine_id, policy in new.items()
    )


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
