"""A sequence ends at the same token, with the same text and reason, however far a draft ran on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rollout_server.engine.actor import EngineActor
from rollout_server.engine.protocol import GeneratedSample, GenerateRequest
from shared.schemas.rollouts import SamplingOptions
from tests.support import proof
from tests.support.engine import generate, greedy, speculate, wait_for_tokens
from tests.support.judge import judge_greedy
from tests.support.models import CHARACTERS, CONTEXT_LENGTH, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

DRAFT_LENGTHS = range(1, 9) if proof.IS_LONG else (3, 8)
NUM_PROMPTS = 200 if proof.IS_LONG else 30


def ending(sample: GeneratedSample) -> tuple[list[int], str, str, int]:
    return sample.token_ids, sample.text, sample.finish_reason, len(sample.logprobs)


STOPS = {
    "stop strings": SamplingOptions(temperature=0, max_tokens=40, stop=["1", "ab", "+-", "cdm"]),
    "stop tokens": SamplingOptions(temperature=0, max_tokens=40, stop_token_ids=[7, 12, 19]),
    "both": SamplingOptions(temperature=0, max_tokens=40, stop=["2"], stop_token_ids=[11, 25]),
    "both, and not before the ninth token": SamplingOptions(
        temperature=0, max_tokens=40, min_tokens=9, stop_token_ids=[11, 25]
    ),
    "end of sequence": SamplingOptions(temperature=0, max_tokens=40),
    "every character": SamplingOptions(temperature=0, max_tokens=40, stop=list(CHARACTERS[:16])),
}


@pytest.mark.parametrize("name", STOPS)
async def test_stops_cut_at_the_same_token(proof_engine: EngineActor, name: str) -> None:
    prompts = random_prompts(NUM_PROMPTS, seed=41)
    await speculate(proof_engine, 0)
    plain = [ending(group[0]) for group in await generate(proof_engine, prompts, STOPS[name])]
    for length in DRAFT_LENGTHS:
        await speculate(proof_engine, length)
        drafted = [ending(group[0]) for group in await generate(proof_engine, prompts, STOPS[name])]
        assert drafted == plain, f"draft length {length}"
    num_stopped = sum(reason == "stop" for _, _, reason, _ in plain)
    assert num_stopped > 0
    proof.record(
        "endings",
        name,
        num_prompts=NUM_PROMPTS,
        num_stopped=num_stopped,
        draft_lengths=list(DRAFT_LENGTHS),
        num_different=0,
    )


async def test_max_tokens_inside_a_draft_is_exact(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    prompts = random_prompts(4, seed=42)
    await speculate(proof_engine, 0)
    plain = [group[0].token_ids for group in await generate(proof_engine, prompts, greedy(20))]
    assert judge_greedy(tiny_model, prompts, plain).num_wrong == 0
    for length in DRAFT_LENGTHS:
        await speculate(proof_engine, length)
        runs = await asyncio.gather(
            *(
                generate(proof_engine, prompts, greedy(limit), name=f"limit-{limit}")
                for limit in range(1, 20)
            )
        )
        for limit, groups in zip(range(1, 20), runs, strict=True):
            for (sample,), reference in zip(groups, plain, strict=True):
                assert sample.token_ids == reference[:limit]
                assert len(sample.logprobs) == limit
                assert sample.finish_reason == "length"


async def test_the_end_of_the_context_inside_a_draft_is_exact(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    # Prompts that leave room for 1 to 24 tokens, at every offset to the last KV block's end.
    prompts = [
        (random_prompts(1, seed=43 + room, longest=60)[0] * CONTEXT_LENGTH)[: CONTEXT_LENGTH - room]
        for room in range(1, 25)
    ]
    for length in (0, *DRAFT_LENGTHS):
        await speculate(proof_engine, length)
        runs = await asyncio.gather(
            *(
                generate(
                    proof_engine, [prompt], greedy(CONTEXT_LENGTH - len(prompt)), name=f"end-{room}"
                )
                for room, prompt in enumerate(prompts)
            )
        )
        outputs = [groups[0][0].token_ids for groups in runs]
        assert [len(tokens) for tokens in outputs] == list(range(1, 25))
        assert judge_greedy(tiny_model, prompts, outputs).num_wrong == 0, f"draft length {length}"


async def test_an_abort_inside_a_draft_returns_a_prefix_of_the_right_answer(
    proof_engine: EngineActor, tiny_model: Path
) -> None:
    prompts = random_prompts(8, seed=44)
    await speculate(proof_engine, 8)
    requests = [
        GenerateRequest(
            request_id=f"aborted-{index}", prompt_token_ids=prompt, n=1, sampling=greedy(440)
        )
        for index, prompt in enumerate(prompts)
    ]
    start = (await proof_engine.load())["num_generation_tokens"]
    tasks = [asyncio.create_task(proof_engine.generate(request)) for request in requests]
    for index, request in enumerate(requests):
        await wait_for_tokens(proof_engine, start + 40 * (index + 1))
        await proof_engine.abort(request.request_id)
    partial = [(await task).samples[0] for task in tasks]
    outputs = [sample.token_ids for sample in partial]
    assert {sample.finish_reason for sample in partial} == {"abort"}
    assert any(0 < len(tokens) < 440 for tokens in outputs)
    for sample in partial:
        assert len(sample.logprobs) == len(sample.token_ids)
    kept = [(prompt, tokens) for prompt, tokens in zip(prompts, outputs, strict=True) if tokens]
    verdict = judge_greedy(tiny_model, [p for p, _ in kept], [tokens for _, tokens in kept])
    assert verdict.num_wrong == 0
    # The engine is none the worse for it.
    again = [group[0].token_ids for group in await generate(proof_engine, prompts, greedy(60))]
    assert judge_greedy(tiny_model, prompts, again).num_wrong == 0
