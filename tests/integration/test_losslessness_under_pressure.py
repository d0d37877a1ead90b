"""Speculation stays invisible when the engine is short of room; and an exact drafter is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.schemas.rollouts import SamplingOptions
from tests.support.engine import generate, greedy, running_engine, speculate
from tests.support.models import greedy_reference, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


async def test_greedy_output_survives_chunked_prefill_preemption_and_shared_prefixes(
    tiny_model: Path,
) -> None:
    # 8 sequences of up to 210 tokens want 56 blocks of 32 and get 24; prompts of up to 150 tokens
    # are prefilled 48 at a time; half of them begin alike.
    crowded = {"num_kv_blocks": 24, "max_num_seqs": 8, "max_num_batched_tokens": 48}
    prompts = random_prompts(12, seed=6, longest=150)
    prompts += [prompts[0][:96] + prompt[:40] for prompt in prompts[1:9]]
    expected = greedy_reference(tiny_model, prompts, 60)
    async with running_engine(tiny_model, engine=crowded) as engine:
        for num_speculative_tokens in (5, 2, 0):
            await speculate(engine, num_speculative_tokens)
            name = f"k{num_speculative_tokens}"
            samples = await generate(engine, prompts, greedy(60), name=name)
            assert [group[0].token_ids for group in samples] == expected, name
        assert (await engine.load())["num_preemptions"] > 0


async def test_greedy_output_survives_the_end_of_the_context(tiny_model: Path) -> None:
    prompts = random_prompts(4, seed=7, longest=20)
    # The engine's context is 512 tokens: these run into it.
    lengths = [512 - len(prompt) for prompt in prompts]
    expected = [
        greedy_reference(tiny_model, [prompt], length)[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    async with running_engine(tiny_model) as engine:
        await speculate(engine, 5)
        for prompt, length, reference in zip(prompts, lengths, expected, strict=True):
            ((sample,),) = await generate(engine, [prompt], greedy(length), name=f"end{length}")
            assert sample.token_ids == reference


async def test_a_drafter_made_of_the_targets_own_weights_is_accepted_always(
    tiny_model: Path,
) -> None:
    async with running_engine(tiny_model, drafter={"scheme": "none"}) as engine:
        await speculate(engine, 4)
        sampling = SamplingOptions(temperature=1.0, max_tokens=60, ignore_eos=True)
        await generate(engine, random_prompts(16, seed=8), sampling, n=2)
        report = await engine.speculation(0)
        assert report.num_draft_tokens > 500
        assert report.num_accepted_tokens == report.num_draft_tokens
