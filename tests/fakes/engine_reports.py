"""What fake engines report of themselves."""

from __future__ import annotations

from shared.schemas.engines import EngineStatus
from shared.schemas.speculation import EngineSpeculation, SpeculationStep
from shared.types import DrafterScheme, EngineState, SpeculationReason


def fake_status(
    engine_id: str, node_id: str, state: EngineState, version: int, num_running: int
) -> EngineStatus:
    """Mostly constants."""
    return EngineStatus(
        engine_id=engine_id,
        node_id=node_id,
        state=state,
        pid=1,
        cpu_cores=None,
        target_version=version,
        drafter_version=version,
        drafter_scheme=DrafterScheme.INT8,
        num_running_reqs=num_running,
        num_waiting_reqs=0,
        kv_cache_usage=0.25,
        num_kv_blocks=100,
        block_size=16,
        max_model_len=1024,
        num_generation_tokens=10,
        num_prompt_tokens=5,
        num_preemptions=0,
        num_reserved=0,
        start_up_s=1.0,
        uptime_s=2.0,
    )


def fake_speculation(engine_id: str, since_step: int) -> EngineSpeculation:
    """Ten steps, all alike."""
    steps = [
        SpeculationStep(
            step=step,
            time_s=float(step),
            kv_cache_usage=0.1,
            num_running_reqs=1,
            num_waiting_reqs=0,
            num_speculative_tokens=4,
            reason=SpeculationReason.BELOW_THRESHOLD,
        )
        for step in range(1, 11)
        if step > since_step
    ]
    return EngineSpeculation(
        engine_id=engine_id,
        enabled=True,
        num_speculative_tokens=4,
        reason=SpeculationReason.BELOW_THRESHOLD,
        kv_cache_usage=0.25,
        num_steps=10,
        num_steps_on=10,
        num_switches=0,
        num_drafts=10,
        num_draft_tokens=40,
        num_accepted_tokens=30,
        num_accepted_tokens_per_pos=[10, 8, 7, 5],
        mean_acceptance_length=4.0,
        num_steps_per_k=[2, 0, 0, 0, 8],
        time_s_per_k=[0.5, 0.0, 0.0, 0.0, 1.5],
        num_steps_per_reason={
            SpeculationReason.BELOW_THRESHOLD: 8,
            SpeculationReason.ABOVE_THRESHOLD: 2,
        },
        num_steps_per_kv_usage=[0, 3, 5, 0, 0, 0, 0, 0, 0, 2],
        kv_cache_usage_sum=3.5,
        acceptance_per_pos=[0.9, 0.8, 0.7, 0.6],
        num_acceptance_changes=1,
        cost_model="self",
        machine_factor=1.25,
        num_predicted_steps=9,
        predicted_step_s=1.8,
        realised_step_s=1.9,
        median_step_time_error=0.05,
        history=steps,
    )
