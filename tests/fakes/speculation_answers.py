"""What ``GET /v1/speculation`` says of one engine that always drafts."""

from __future__ import annotations

import time

from shared.schemas.speculation import (
    EngineSpeculation,
    SpeculationPolicy,
    SpeculationResponse,
    SpeculationStep,
)
from shared.types import SpeculationMode, SpeculationReason


def speculation_answer(num_polls: int, since_step: int) -> SpeculationResponse:
    """The answer to poll ``num_polls``: a decision, two drafts and three accepted tokens each."""
    history = [
        SpeculationStep(
            step=step,
            time_s=time.time(),
            kv_cache_usage=0.2,
            num_running_reqs=1,
            num_waiting_reqs=0,
            num_speculative_tokens=2,
            reason=SpeculationReason.BELOW_THRESHOLD,
        )
        for step in range(since_step + 1, num_polls + 1)
    ]
    return SpeculationResponse(
        policy=SpeculationPolicy(
            mode=SpeculationMode.KV_GATE,
            num_speculative_tokens=2,
            kv_cache_threshold=0.5,
            kv_cache_hysteresis=0.05,
            min_dwell_steps=1,
        ),
        max_num_speculative_tokens=2,
        engines=[
            EngineSpeculation(
                engine_id="engine-0",
                enabled=True,
                num_speculative_tokens=2,
                reason=SpeculationReason.BELOW_THRESHOLD,
                kv_cache_usage=0.2,
                num_steps=num_polls,
                num_steps_on=num_polls,
                num_switches=0,
                num_drafts=2 * num_polls,
                num_draft_tokens=4 * num_polls,
                num_accepted_tokens=3 * num_polls,
                num_accepted_tokens_per_pos=[2 * num_polls, num_polls],
                mean_acceptance_length=2.5,
                history=history,
            )
        ],
    )
