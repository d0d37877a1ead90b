"""Speculation must be invisible in the output: greedy token for token, sampled by distribution."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from rollout_server.engine.actor import EngineActor
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import SpeculationPatch
from shared.types import SpeculationMode
from tests.support.engine import generate, greedy, speculate
from tests.support.models import greedy_reference, logprob_reference, random_prompts
from tests.support.statistics import smallest_p_value

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

NUM_SEQUENCES = 1600
SEQUENCE_TOKENS = 16
PROMPT = [5, 9, 4, 7, 3] * 4
"""Long enough that a sequence needs its second KV block half-way: occupancy doubles there."""
SIGNIFICANCE = 1e-5
"""A sound engine falls below it about once in some thousand runs of this file."""


@pytest.mark.parametrize("num_speculative_tokens", [0, 1, 3, 5])
async def test_greedy_output_equals_hugging_face_token_for_token(
    engine: EngineActor, tiny_model: Path, num_speculative_tokens: int
) -> None:
    prompts = random_prompts(60, seed=1)
    expected = greedy_reference(tiny_model, prompts, num_tokens=48)
    before = await engine.speculation(0)
    await speculate(engine, num_speculative_tokens)
    samples = await generate(engine, prompts, greedy(48))
    after = await engine.speculation(0)
    assert [group[0].token_ids for group in samples] == expected
    num_drafted = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    if num_speculative_tokens == 0:
        assert num_drafted == 0
    else:
        assert 0 < num_accepted < num_drafted, "both accepted and rejected drafts must occur"


async def sample_sequences(
    engine: EngineActor, name: str, temperature: float = 1.0
) -> list[list[int]]:
    """Independent sequences from one prompt."""
    sampling = SamplingOptions(temperature=temperature, max_tokens=SEQUENCE_TOKENS, ignore_eos=True)
    groups = await generate(engine, [PROMPT] * (NUM_SEQUENCES // 10), sampling, n=10, name=name)
    return [sample.token_ids for group in groups for sample in group]


async def change_policy_forever(engine: EngineActor) -> None:
    """On top of the gate: other lengths, always on, off, and the gate again."""
    while True:
        for patch in (
            SpeculationPatch(num_speculative_tokens=1),
            SpeculationPatch(mode=SpeculationMode.ALWAYS, num_speculative_tokens=5),
            SpeculationPatch(mode=SpeculationMode.OFF),
            SpeculationPatch(mode=SpeculationMode.KV_GATE, num_speculative_tokens=3),
        ):
            await asyncio.sleep(0.05)
            await engine.set_speculation(patch)


async def test_sampled_distribution_is_the_same_off_on_and_switching(engine: EngineActor) -> None:
    await speculate(engine, 0)
    off = await sample_sequences(engine, "off")
    await speculate(engine, 3)
    on = await sample_sequences(engine, "on")
    # 64 sequences hold 64 of 400 blocks in their first half and 128 in the second: the gate
    # closes in the middle of every sequence and opens again for the next ones.
    gate = SpeculationPatch(
        mode=SpeculationMode.KV_GATE,
        num_speculative_tokens=3,
        kv_cache_threshold=0.24,
        kv_cache_hysteresis=0.0,
        min_dwell_steps=0,
    )
    await engine.set_speculation(gate)
    before = await engine.speculation(0)
    changing = asyncio.create_task(change_policy_forever(engine))
    switched = await sample_sequences(engine, "switching")
    changing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await changing
    after = await engine.speculation(0)
    assert NUM_SEQUENCES * SEQUENCE_TOKENS >= 20_000
    assert len(off) == len(on) == len(switched) == NUM_SEQUENCES
    assert after.num_switches - before.num_switches >= 20
    assert smallest_p_value(off, on) > SIGNIFICANCE
    assert smallest_p_value(off, switched) > SIGNIFICANCE


async def test_the_distribution_test_sees_another_temperature(
    engine: EngineActor,
) -> None:
    await speculate(engine, 3)
    exact = await sample_sequences(engine, "exact")
    warmer = await sample_sequences(engine, "warmer", temperature=1.3)
    assert smallest_p_value(exact, warmer) < SIGNIFICANCE


@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
async def test_logprobs_are_those_of_the_behaviour_policy_at_the_sampling_temperature(
    engine: EngineActor, tiny_model: Path, num_speculative_tokens: int
) -> None:
    await speculate(engine, num_speculative_tokens)
    sampling = SamplingOptions(temperature=0.7, max_tokens=40, ignore_eos=True)
    prompts = random_prompts(4, seed=2)
    groups = await generate(engine, prompts, sampling, n=2)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            assert len(sample.logprobs) == len(sample.token_ids) == 40
            expected = logprob_reference(tiny_model, prompt, sample.token_ids, 0.7)
            assert sample.logprobs == pytest.approx(expected, abs=1e-4)


async def test_stopping_inside_a_draft_cuts_at_the_same_token(
    engine: EngineActor, tiny_model: Path
) -> None:
    prompts = random_prompts(20, seed=3)
    texts = []
    for num_speculative_tokens in (0, 5):
        await speculate(engine, num_speculative_tokens)
        sampling = SamplingOptions(
            temperature=0.0, max_tokens=37, stop=["1", "ab"], stop_token_ids=[7]
        )
        groups = await generate(engine, prompts, sampling)
        texts.append(
            [(g[0].token_ids, g[0].text, g[0].finish_reason, len(g[0].logprobs)) for g in groups]
        )
    assert texts[0] == texts[1]
