"""Puts together what the server knows of an engine and what the engine says of itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.facts import EngineFacts
from shared.schemas.engines import EngineStatus
from shared.types import DrafterScheme, EngineState


def engine_status(
    spec: EngineSpec,
    facts: EngineFacts | None,
    load: Mapping[str, Any],
    *,
    state: EngineState,
    error: str | None,
    committed_version: int,
    node_id: str,
    uptime_s: float,
) -> EngineStatus:
    """The wire record.

    Args:
        facts: None until the engine has started.
        load: the engine core's figures; empty when it cannot be asked.
    """
    return EngineStatus(
        engine_id=spec.engine_id,
        pool=spec.pool,
        node_id=node_id,
        state=state,
        error=error,
        pid=None if facts is None else facts.pid,
        cpu_cores=spec.cpu_cores,
        target_version=load.get("target_version", committed_version),
        drafter_version=load.get("drafter_version", committed_version),
        drafter_scheme=DrafterScheme.AUTO if facts is None else facts.drafter_scheme,
        num_running_reqs=load.get("num_running_reqs", 0),
        num_waiting_reqs=load.get("num_waiting_reqs", 0),
        kv_cache_usage=load.get("kv_cache_usage", 0.0),
        num_kv_blocks=0 if facts is None else facts.num_kv_blocks,
        block_size=0 if facts is None else facts.block_size,
        max_model_len=0 if facts is None else facts.max_model_len,
        num_generation_tokens=load.get("num_generation_tokens", 0),
        num_prompt_tokens=load.get("num_prompt_tokens", 0),
        num_preemptions=load.get("num_preemptions", 0),
        num_reserved=0,
        start_up_s=0.0 if facts is None else facts.start_up_s,
        uptime_s=uptime_s,
    )
