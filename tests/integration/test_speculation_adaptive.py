"""The adaptive scheduler on a real engine: calibrates itself, decides, learns, takes no room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.start_calibration import SELF_CALIBRATED
from rollout_server.speculation.replay import replay
from rollout_server.speculation.trace import read_trace
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationMode, SpeculationReason
from tests.support.engine import generate, greedy, running_engine
from tests.support.models import greedy_reference, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

NUM_SEQUENCES = 8
BLOCK_SIZE = 32
BLOCKS_EACH = 6
MAX_DRAFT_LENGTH = 5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adaptive_engine(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[EngineActor, Path]]:
    """Adaptive, with just the KV blocks that plain decoding of eight long sequences fills."""
    traces = tmp_path_factory.mktemp("traces")
    async with running_engine(
        tiny_model,
        engine={
            # One more: vLLM keeps a block for itself.
            "num_kv_blocks": NUM_SEQUENCES * BLOCKS_EACH + 1,
            "block_size": BLOCK_SIZE,
            "max_num_seqs": NUM_SEQUENCES,
        },
        max_draft_length=MAX_DRAFT_LENGTH,
        speculation={
            "mode": SpeculationMode.ADAPTIVE,
            "kv_cache_threshold": 1.0,
            "trace_directory": str(traces),
        },
    ) as engine:
        yield engine, traces / "test-engine.jsonl"


async def test_an_engine_nobody_calibrated_measures_itself_before_it_serves(
    adaptive_engine: tuple[EngineActor, Path],
) -> None:
    report = await adaptive_engine[0].speculation(0)
    assert report.cost_model == SELF_CALIBRATED
    assert report.num_steps == sum(report.num_steps_per_k)


async def test_adaptive_output_is_the_models_own_and_its_predictions_are_reported(
    adaptive_engine: tuple[EngineActor, Path], tiny_model: Path
) -> None:
    engine, _ = adaptive_engine
    await engine.set_speculation(SpeculationPatch(mode=SpeculationMode.ADAPTIVE))
    prompts = random_prompts(16, seed=3)
    before = await engine.speculation(0)
    samples = await generate(engine, prompts, greedy(60), name="adaptive")
    after = await engine.speculation(before.num_steps)
    expected = greedy_reference(tiny_model, prompts, 60)
    assert [group[0].token_ids for group in samples] == expected
    assert after.num_predicted_steps > before.num_predicted_steps
    assert after.predicted_step_s > 0
    decided = {step.reason for step in after.history}
    assert decided <= {
        SpeculationReason.PREDICTED_FASTER,
        SpeculationReason.PREDICTED_SLOWER,
        SpeculationReason.EXPLORING,
        SpeculationReason.NO_ROOM,
    }
    assert all(step.predicted_tokens_per_s for step in after.history if step.predicted_speedup)
    assert sum(after.time_s_per_k) == pytest.approx(after.realised_step_s, rel=0.5)


@pytest.mark.parametrize("mode", [SpeculationMode.ALWAYS, SpeculationMode.OFF])
async def test_drafts_take_no_block_that_plain_decoding_needs(
    adaptive_engine: tuple[EngineActor, Path], mode: SpeculationMode
) -> None:
    """Eight sequences fill the pool to its last block: a block taken for drafts is one too many."""
    engine, _ = adaptive_engine
    await engine.set_speculation(
        SpeculationPatch(mode=mode, num_speculative_tokens=MAX_DRAFT_LENGTH)
    )
    prompts = [[7 + index, 5, 9] for index in range(NUM_SEQUENCES)]
    num_tokens = BLOCKS_EACH * BLOCK_SIZE - len(prompts[0])
    sampling = SamplingOptions(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    before = await engine.load()
    drafts_before = (await engine.speculation(0)).num_drafts
    groups = await generate(engine, prompts, sampling, name=f"full-{mode.value}")
    load = await engine.load()
    assert all(len(group[0].token_ids) == num_tokens for group in groups)
    assert load["num_preemptions"] == before["num_preemptions"]
    drafted = (await engine.speculation(0)).num_drafts - drafts_before
    assert (drafted > 0) == (mode is SpeculationMode.ALWAYS)


async def test_a_replay_of_the_trace_decides_what_the_engine_decided(
    adaptive_engine: tuple[EngineActor, Path],
) -> None:
    engine, trace = adaptive_engine
    report = await engine.speculation(0)  # a report flushes the trace
    replayed = replay(read_trace(trace))
    assert replayed.num_steps == report.num_steps
    assert replayed.num_different == 0, replayed.first_differences
    stricter = replay(read_trace(trace), SpeculationPatch(mode=SpeculationMode.OFF))
    assert stricter.num_different > 0
