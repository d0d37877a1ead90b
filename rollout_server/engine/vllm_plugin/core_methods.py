"""Methods the plugin adds to vLLM's ``EngineCore``.

Called by ``AsyncLLM.engine_core.call_utility_async``; they run between engine steps, in the engine
core process. Leans on (vLLM 0.32.0):
``EngineCore.scheduler`` and the by-name dispatch of utility requests.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rollout_server.drafter.lag import WeightVersions
from rollout_server.speculation.cost_model import CostModel
from shared.schemas.speculation import SpeculationPatch


def slipstream_load(core: Any) -> dict[str, Any]:
    """Load and counters of the engine."""
    scheduler = core.scheduler
    return {
        "num_running_reqs": len(scheduler.running),
        "num_waiting_reqs": len(scheduler.waiting),
        "kv_cache_usage": scheduler.kv_cache_manager.usage,
        "num_generation_tokens": scheduler.num_generation_tokens,
        "num_prompt_tokens": scheduler.num_prompt_tokens,
        "num_preemptions": scheduler.num_preemptions,
        "target_version": scheduler.versions.target,
        "drafter_version": scheduler.versions.drafter,
    }


def slipstream_speculation(core: Any, since_step: int) -> str:
    """``EngineSpeculation`` as JSON."""
    report: str = core.scheduler.report_speculation(since_step).model_dump_json()
    return report


def slipstream_patch_speculation(core: Any, patch_json: str) -> None:
    """Apply a ``SpeculationPatch`` given as JSON."""
    core.scheduler.patch_speculation(SpeculationPatch.model_validate_json(patch_json))


def slipstream_set_cost_model(core: Any, model_json: str, name: str) -> None:
    """Give the scheduler a ``CostModel`` as JSON, and the name it is reported by."""
    core.scheduler.set_cost_model(CostModel.model_validate_json(model_json), name)


def slipstream_begin_sweep(core: Any, draft_lengths: list[int], steps_each: int) -> None:
    """Measure step times over these draft lengths, from the next step on."""
    core.scheduler.speculation.begin_sweep(draft_lengths, steps_each)


def slipstream_end_sweep(core: Any) -> list[tuple[dict[str, int], float]]:
    """Stop measuring: every step's shape and seconds."""
    return [(asdict(shape), s) for shape, s in core.scheduler.speculation.end_sweep()]


def slipstream_set_weight_versions(
    core: Any, target_version: int, drafter_version: int, is_rebuilding: bool = False
) -> None:
    """One place where an engine's versions change: at the end of a load, and of a rebuild."""
    core.scheduler.set_weight_versions(
        WeightVersions(target=target_version, drafter=drafter_version, is_rebuilding=is_rebuilding)
    )
    core.set_weight_version(str(target_version))


CORE_METHODS = (
    slipstream_load,
    slipstream_speculation,
    slipstream_patch_speculation,
    slipstream_set_cost_model,
    slipstream_begin_sweep,
    slipstream_end_sweep,
    slipstream_set_weight_versions,
)
