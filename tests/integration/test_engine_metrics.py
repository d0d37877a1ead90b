"""What a real vLLM engine hands on for /metrics and for the timings of a group."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GenerateRequest
from rollout_server.engine.vllm_metrics import joined
from shared.schemas.rollouts import SamplingOptions
from tests.unit.test_monitoring_files import watched_of_vllm

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

NUM_TOKENS = 12


async def test_vllms_metrics_of_an_engine_carry_its_id_and_count_its_tokens(
    engine: EngineActor,
) -> None:
    async def values() -> dict[tuple[str, str, str], float]:
        text = joined([await engine.vllm_metrics()])
        return {
            (
                sample.name,
                sample.labels["engine"],
                sample.labels.get("engine_index", ""),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = await values()
    request = GenerateRequest(
        request_id="counted",
        prompt_token_ids=[1, 2, 3],
        n=2,
        sampling=SamplingOptions(max_tokens=NUM_TOKENS, ignore_eos=True),
    )
    result = await engine.generate(request)
    after = await values()
    key = ("vllm:generation_tokens_total", "test-engine", "0")
    assert after[key] - before[key] == 2 * NUM_TOKENS
    names = {name for name, *_ in after}
    assert "vllm:time_to_first_token_seconds_bucket" in names
    assert not {name for name in names if name.endswith("_created")}
    assert watched_of_vllm() <= names, "the dashboard shows what this vLLM does not export"

    timings = result.timings
    assert timings is not None
    assert timings.num_tokens == NUM_TOKENS
    assert 0 < timings.first_token_s < result.generate_s
    assert 0 < timings.decode_s < result.generate_s
